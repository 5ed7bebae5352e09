"""Scores on disk: `[rows, queries]` in float32, resumable by row shard, with sign and origin beside the numbers."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from gradstore._encodings import F32
from gradstore._errors import GradStoreError, InvalidInput
from gradstore._files import write_errors
from gradstore._search import ScoredRows, SearchResult, top_and_bottom
from gradstore._store import GradientStore
from gradstore._writer import StoreWriter

SIGN: Final = "positive: training on the row lowers the query's loss"
_KIND: Final = "scores"
_EXPORT_ROWS: Final = 4096


class ScoreStore:
    """Scores of every row for every query.

    Example:
        >>> writer = ScoreStore.create("runs/scores", rows=1000, queries=["q0", "q1"], plan=plan, provenance={"k": 1})
        >>> with writer as w:
        ...     for shard, start, stop in w.pending:
        ...         w.write(shard, scores[start:stop])  # [rows of the shard, queries]
        >>> scores = ScoreStore.open("runs/scores")
        >>> scores.top(5).top_rows
        >>> scores.export("scores.csv")

    A score store is a gradient store with a column per query, so that crashes, checksums, `verify`, `merge` and
    `repair` work alike. Its `meta` says what a positive score means and where the scores come from.
    """

    def __init__(self, store: GradientStore) -> None:
        """Use `open`."""
        meta: Any = store.meta
        if not isinstance(meta, dict) or cast("dict[str, Any]", meta).get("kind") != _KIND:
            raise InvalidInput(f"{store.path}: holds gradients, not scores. Open it with GradientStore.open.")
        self.store = store
        about = cast("dict[str, Any]", meta)
        self.sign: str = about["sign"]
        self.provenance: Any = about["provenance"]

    @classmethod
    def open(cls, path: str | Path, *, partial: bool = False) -> ScoreStore:
        """Open finished scores, or with `partial=True` those that are there."""
        return cls(GradientStore.open(path, partial=partial))

    @staticmethod
    def create(
        path: str | Path,
        *,
        rows: int,
        queries: Sequence[str],
        plan: Any,
        provenance: Any,
        sign: str = SIGN,
        rows_per_shard: int | None = None,
        offsets: NDArray[Any] | None = None,
    ) -> StoreWriter:
        """A writer whose rows are the scores of a row for all queries; `StoreWriter.resume` continues it.

        Args:
            path: A new folder.
            rows: Rows scored.
            queries: A name for each query.
            plan: Any JSON that says how the scores are made; another one can't resume them.
            provenance: Any JSON: the index, the queries, the method and its parameters.
            sign: What a positive score means.
            rows_per_shard, offsets: As for `StoreWriter.create`; with offsets a row is a token.
        """
        if isinstance(queries, str) or len(set(queries)) < len(queries):
            raise InvalidInput("queries must be a list of different names.")
        return StoreWriter.create(
            path,
            rows=rows,
            columns=dict.fromkeys(queries, 1),
            plan=plan,
            meta={"kind": _KIND, "sign": sign, "provenance": provenance},
            rows_per_shard=rows_per_shard,
            side_columns=(),
            data=False,
            offsets=offsets,
        )

    @property
    def queries(self) -> list[str]:
        """Names of the queries, in column order."""
        return list(self.store.columns)

    @property
    def written(self) -> NDArray[np.bool_]:
        """Bool [rows]: which rows are scored; all, unless the store is partial."""
        done = np.zeros(self.store.rows, np.bool_)
        for _, start, stop in self.store.shards:
            done[start:stop] = True
        return done

    def block(self, start: int, stop: int, queries: Sequence[str] | None = None) -> F32:
        """Scores of rows `start` to `stop`, float32 [stop - start, queries], for all queries or those named."""
        return self.store.block(start, stop, queries)

    def top(self, k: int) -> SearchResult:
        """The k rows with the highest and the lowest score for each query, in one sweep; ties go to the lower row."""

        def blocks() -> Iterator[ScoredRows]:
            for shard in self.store.sweep():
                scores = np.ascontiguousarray(shard.values().T)
                yield shard.start, scores, np.zeros_like(scores)  # no errors: what is stored is the score

        return top_and_bottom(len(self.queries), k, blocks())

    def export(self, path: str | Path) -> None:
        """Write all scores to a `.csv`, `.jsonl` or `.parquet` file: a `row` column, then a column per query.

        Parquet needs pyarrow; sign and provenance go into its metadata.
        """
        target = Path(path)
        writers = {".csv": self._export_csv, ".jsonl": self._export_jsonl, ".parquet": self._export_parquet}
        if target.suffix not in writers:
            raise InvalidInput(f"{target}: unknown kind of file {target.suffix!r}; known: {', '.join(writers)}.")
        with write_errors(target):
            writers[target.suffix](target)

    def _blocks(self) -> Iterator[tuple[range, F32]]:
        for _, first, last in self.store.shards:
            for start in range(first, last, _EXPORT_ROWS):
                stop = min(start + _EXPORT_ROWS, last)
                yield range(start, stop), self.block(start, stop)

    def _export_csv(self, target: Path) -> None:
        with open(target, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["row", *self.queries])
            for rows, scores in self._blocks():
                writer.writerows([row, *map(_shortest, line)] for row, line in zip(rows, scores))

    def _export_jsonl(self, target: Path) -> None:
        with open(target, "w", encoding="utf-8") as file:
            for rows, scores in self._blocks():
                for row, line in zip(rows, scores):
                    named = dict(zip(self.queries, (float(_shortest(score)) for score in line)))
                    file.write(json.dumps({"row": row, "scores": named}, ensure_ascii=False) + "\n")

    def _export_parquet(self, target: Path) -> None:
        try:
            arrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
        except ImportError as error:
            raise GradStoreError("Parquet needs pyarrow. Type: uv pip install pyarrow") from error
        notes = {"sign": self.sign, "provenance": json.dumps(self.provenance)}
        fields = [("row", arrow.int64()), *((name, arrow.float32()) for name in self.queries)]
        schema = arrow.schema(fields, metadata=notes)
        with parquet.ParquetWriter(target, schema) as writer:
            for rows, scores in self._blocks():
                columns = [
                    arrow.array(rows, arrow.int64()),
                    *(arrow.array(scores[:, q]) for q in range(scores.shape[1])),
                ]
                writer.write_table(arrow.table(columns, schema=schema))


def _shortest(score: np.float32) -> str:
    """The shortest decimal that reads back as the same float32."""
    return np.format_float_positional(score, unique=True, trim="0") if 1e-4 <= abs(score) < 1e7 else str(score)
