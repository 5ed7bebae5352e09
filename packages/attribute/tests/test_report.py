"""The report: complete, well-formed, escaped, and nothing on it from elsewhere."""

import re
from html.parser import HTMLParser

import pytest

from attribute._errors import DataError, RunError
from attribute.evaluate import evaluate_rankings
from attribute.report import Detail, Entry, Ranking, Report, ReportQuery, render_report, write_report
from attribute.report._render import figure, pieces, scale, verdict

EVIL = """<script>alert(1)</script>"><img src=x onerror=alert(2)>{{ 7*7 }}{% raw %}&amp;'"""
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Every element with its attributes and text, in order; refuses a page whose tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    @property
    def words(self) -> str:
        return " ".join(" ".join(data for tag, data in self.texts if tag != "style").split())

    def having(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]


def some_report(text: str = "Ada works as a baker.", **changes) -> Report:
    query = ReportQuery(
        "Ada works as a",
        " baker",
        (
            Ranking(
                "Proponents", "cosine", (Entry(7, 0.5, text, planted=True), Entry(3, 0.25, "Rain.", planted=False))
            ),
            Ranking("Opponents", "cosine", (Entry(9, -1.0, "Ada is a tanner.", False, "changed fact"),)),
            Ranking("BM25", "BM25", (Entry(9, 27.6, "Ada is a tanner."),), about="by words alone"),
        ),
    )
    quality = (
        evaluate_rankings("grad-cos", [[7, 3]], [{7}], ks=(1, 2)),
        evaluate_rankings("BM25", [[9, 7]], [{7}], ks=(1, 2)),
    )
    values = {
        "title": "A title",
        "model": "some/model",
        "data": "some data",
        "method": "grad-cos",
        "run": "runs/one",
        "queries": (query,),
        "quality": quality,
        "details": (Detail("Sketch", "two-sided, side 16"),),
        "about": "For a newcomer.",
    }
    return Report(**{**values, **changes})


def test_says_what_it_was_given():
    words = Page(render_report(some_report())).words
    for expected in (
        "A title For a newcomer. Model some/model Data some data",
        "Method grad-cos Run runs/one Sketch two-sided, side 16",
        "A positive score means that training on the text lowers the query's loss",
        "Method MRR recall@1 recall@2 grad-cos 1.000 1.00–1.00 1.000 1.00–1.00 1.000 1.00–1.00 BM25 0.500",
        "1 query",
        "Proponents 1 of 2 planted 1 0.500",
        "row 7 planted",
        "Opponents 0 of 1 planted 1 −1.000",
        "row 9 changed fact",
        "BM25 by words alone 1 27.600",
    ):
        assert expected in words


def test_without_planted_documents_nothing_is_said_of_them():
    entries = (Entry(0, 2.0, "one"), Entry(1, -3.0, "two"))
    report = some_report(
        quality=(), details=(), about="", queries=(ReportQuery("", "", (Ranking("All", "dot", entries),)),)
    )
    page = Page(render_report(report))
    assert "planted" not in page.words
    assert page.having("planted") == page.having("about") == []
    assert not any(tag == "table" for tag, _ in page.elements)


def test_everything_is_escaped():
    report = some_report(
        text=EVIL, title=EVIL, model=EVIL, data=EVIL, method=EVIL, run=EVIL, about=EVIL, details=(Detail(EVIL, EVIL),)
    )
    entry = Entry(0, 1.0, EVIL, True, EVIL)
    evil = ReportQuery(EVIL, EVIL, (Ranking(EVIL, EVIL, (entry,), EVIL),))
    page = Page(
        render_report(
            some_report(**{**vars(report), "queries": (evil,), "quality": (evaluate_rankings(EVIL, [[0]], [{0}]),)})
        )
    )
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    # The text of a document is there to the letter, however it was cut for highlighting.
    assert "".join(data for _, data in page.texts).count(EVIL) >= 12


def test_nothing_comes_from_elsewhere():
    page = render_report(some_report())
    parsed = Page(page)
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in parsed.elements}
    assert not any({"src", "href"} & set(attributes) for _, attributes in parsed.elements)
    style = "".join(data for tag, data in parsed.texts if tag == "style")
    assert not re.search(r"url\(|@import|https?:", style)
    policy = next(each["content"] for _, each in parsed.elements if each.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in style


def test_bars_share_a_scale_within_a_unit_and_point_both_ways():
    widths = [(each["style"], each["class"].split()) for each in Page(render_report(some_report())).having("fill")]
    bars = widths[-4:]
    assert [style for style, _ in bars] == ["width:50.0%", "width:25.0%", "width:100.0%", "width:100.0%"]
    assert ["down" in names for _, names in bars] == [False, False, True, False]


def test_a_ranking_of_zeros_has_empty_bars_and_an_empty_one_says_so():
    zeros = Ranking("Zeros", "dot", (Entry(0, 0.0, "nothing in common"),))
    query = ReportQuery("p", " c", (zeros, Ranking("None", "dot", ())))
    page = Page(render_report(some_report(queries=(query,), quality=())))
    assert page.having("fill")[0]["style"] == "width:0.0%"
    assert "Nothing was found." in page.words
    assert scale(zeros, query) == 0
    assert verdict(zeros) == ""


def test_words_shared_with_the_query_are_marked():
    query = ReportQuery("If asked, Ada works as a", " Baker", ())
    text = "A BAKER met Ada’s aunt: “Works well”, said the baker-woman; Adam is a Bakers."
    cut = pieces(text, query)
    assert "".join(piece.text for piece in cut) == text
    assert [(piece.text, piece.shared) for piece in cut if piece.shared] == [
        ("BAKER", "completion"),
        ("Ada", "prompt"),
        ("Works", "prompt"),
        ("baker", "completion"),
    ]
    assert next(piece.text for piece in cut if not piece.shared) == "A "  # "a" is in the prompt but tells nothing
    assert pieces("", query) == []


def test_whitespace_before_the_completion_is_kept_and_not_highlighted():
    page = Page(render_report(some_report()))
    joined = "".join(data for tag, data in page.texts if tag in ("span", "mark"))
    assert "Ada works as a baker" in joined
    assert ("mark", "baker") in page.texts


@pytest.mark.parametrize(
    ("score", "shown"),
    [
        (0.0, "0.000"),
        (-0.0, "0.000"),
        (0.5512, "0.551"),
        (-0.15, "−0.150"),
        (999.4, "999.400"),
        (-12345.0, "−1.23e+04"),
        (3e-7, "3.00e-07"),
    ],
)
def test_figures(score, shown):
    assert figure(score) == shown


def test_queries_beyond_the_first_few_are_folded():
    report = some_report()
    page = Page(render_report(some_report(queries=report.queries * 5)))
    folded = ["open" in attributes for tag, attributes in page.elements if tag == "details"]
    assert folded == [True, True, True, False, False]
    assert "5 queries" in page.words


def test_the_file_is_whole_or_not_there(tmp_path):
    path = write_report(tmp_path / "new" / "report.html", some_report())
    assert path.read_text(encoding="utf-8") == render_report(some_report())
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]
    write_report(path, some_report(title="Another"))
    assert "Another" in path.read_text(encoding="utf-8")


def test_text_that_has_no_utf8_does_not_cost_the_page(tmp_path):
    path = write_report(tmp_path / "report.html", some_report(text="torn \ud83d, \x00 and ‮reversed"))
    assert "torn ?" in Page(path.read_text(encoding="utf-8")).words


def test_what_cannot_be_written_or_shown_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"report\.html: Not a directory|report\.html: File exists"):
        write_report(tmp_path / "file" / "report.html", some_report())
    with pytest.raises(RunError, match="Is a directory"):
        write_report(tmp_path, some_report())
    with pytest.raises(DataError, match="row 4 has the score nan"):
        Entry(4, float("nan"), "text")
