"""The demo from end to end: train or find the model, collect gradients, ask every query, write the page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from attribute.config import DataConfig, IndexConfig
from attribute.demo.corpus import DemoCorpus, demo_corpus
from attribute.demo.model import default_cache, demo_model
from attribute.demo.showcase import compare, demo_report
from attribute.evaluate import Quality
from attribute.index import build_index, source_of
from attribute.methods import method_named
from attribute.progress import Progress, Quiet
from attribute.query import Asker
from attribute.report import Report, write_report

_METHODS = ("grad-cos", "grad-dot")


@dataclass(frozen=True)
class DemoResult:
    """What the demo found: figures of each method, the page with some queries spelt out, and where it lies."""

    quality: tuple[Quality, ...]
    report: Report
    page: Path


def run_demo(run: str | Path, *, progress: Progress | None = None) -> DemoResult:
    """Run the demo into a folder, replacing an earlier one.

    Args:
        run: the run folder; it becomes an ordinary index that ``trace query`` can ask.
        progress: told of each stage.
    """
    corpus = demo_corpus()
    config = demo_config(progress)
    build_index(run, config, overwrite=True, progress=progress)
    asker = Asker.open(run)
    columns = DataConfig(prompt_column="prompt", completion_column="completion")
    gradients = asker.gradients(source_of([asdict(query) for query in corpus.queries]), columns)
    scores = {name: method_named(name).scores(asker.store, gradients) for name in _METHODS}
    report = demo_report(corpus, scores, model=Path(config.model).name, run=str(run))
    return DemoResult(compare(corpus, scores), report, write_report(Path(run) / "report.html", report))


def demo_config(progress: Progress | None = None) -> IndexConfig:
    """The configuration of ``trace build`` without model and dataset: the demo's own, made when they are not there."""
    progress = progress or Quiet()
    started = False

    def on_step(done: int, total: int, loss: float) -> None:
        nonlocal started
        if not started:
            progress.note("a small model learns invented facts; it is kept for the next time")
            progress.start("train", total, "steps")
            started = True
        progress.advance(1)

    model = demo_model(on_step=on_step)
    if started:
        progress.stop()
    return IndexConfig(model=str(model), data=DataConfig(dataset=str(demo_dataset())))


def demo_dataset(corpus: DemoCorpus | None = None) -> Path:
    """The corpus as a file in the cache folder, a record a document."""
    corpus = corpus or demo_corpus()
    path = default_cache() / f"demo-corpus-{corpus.digest[:16]}.jsonl"
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        lines = (json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in corpus.documents)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text("".join(lines), encoding="utf-8")
        unfinished.replace(path)
    return path
