"""The errors of attribute.

AttributionError
├── DataError      a dataset that cannot be read, rendered or tokenised as asked
├── ModelError     a model that cannot be loaded or measured
├── PeerLost       another of the processes that share a run ended too early
└── RunError       a run folder that cannot be written, continued or queried
"""

from __future__ import annotations


class AttributionError(Exception):
    """Base class: every error attribute raises on purpose is one of these."""


class DataError(AttributionError):
    """A dataset that cannot be read, rendered or tokenised as asked."""


class ModelError(AttributionError):
    """A model that cannot be loaded, or whose loss cannot be measured."""


class PeerLost(AttributionError):
    """Another of the processes that share a run ended before its work was done, and has said why itself."""

    exit_code = 75  # EX_TEMPFAIL: not this process's failure


class RunError(AttributionError):
    """A run folder that cannot be written, continued or queried as asked."""
