"""One self-contained HTML page a person can open and read: queries, what made the model say them, how sure that is."""

from attribute.report._page import Detail, Entry, Ranking, Report, ReportQuery
from attribute.report._render import render_report, write_report

__all__ = ["Detail", "Entry", "Ranking", "Report", "ReportQuery", "render_report", "write_report"]
