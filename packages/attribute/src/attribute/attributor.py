"""Asking a gradient store: by gradients, or by whatever backward passes run inside a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from attribute._adapters import output_modules, transformer_of
from attribute._device_search import search_on
from attribute._errors import RunError
from attribute.methods import method_named
from attribute.model import pick_device
from attribute.spectral import plan_of
from gradcore import CapturePlan, GradientCollector, model_fingerprint, select_modules
from gradstore import FaissConfig, FaissIndex, GradientStore, SearchResult


@dataclass(frozen=True)
class Hit:
    """A training row and its score; ``record`` holds the dataset's columns.

    Of an index of tokens ``row`` is a token, ``document`` and ``position`` say where it stands, and the record is the
    document's.
    """

    row: int
    score: float
    record: Mapping[str, Any]
    document: int | None = None
    position: int | None = None

    @property
    def text(self) -> str:
        """The row's text: its column ``text``, or all its columns of text."""
        return record_text(self.record)

    def column(self, name: str) -> str:
        """One column as text; :attr:`text` if the row has no such column."""
        return str(self.record[name]) if name in self.record else self.text


class Attribution:
    """What a search found: ``[q, k]`` scores and row numbers, and the texts behind them.

    ``scores`` and ``indices`` are the proponents, best first, or with ``reverse=True`` the opponents, the most
    opposed first.
    """

    def __init__(self, store: GradientStore, reverse: bool) -> None:
        self._store = store
        self._reverse = reverse
        self._found: SearchResult | None = None

    @classmethod
    def of(cls, store: GradientStore, result: SearchResult) -> Attribution:
        """What was found in another way than by a search of this module."""
        made = cls(store, reverse=False)
        made._found = result
        return made

    def __len__(self) -> int:
        return len(self.result.top_rows)

    @property
    def indices(self) -> np.ndarray:
        """Row numbers ``[q, k]``."""
        return self.result.bottom_rows if self._reverse else self.result.top_rows

    @property
    def scores(self) -> np.ndarray:
        """Scores ``[q, k]``: positive means that training on the row lowers the query's loss."""
        return self.result.bottom_scores if self._reverse else self.result.top_scores

    def proponents(self, query: int = 0) -> list[Hit]:
        """The highest-scoring rows of one query, resolved to their records."""
        return self._hits(self.result.top_rows[query], self.result.top_scores[query])

    def opponents(self, query: int = 0) -> list[Hit]:
        """The lowest-scoring rows of one query, resolved to their records."""
        return self._hits(self.result.bottom_rows[query], self.result.bottom_scores[query])

    @property
    def result(self) -> SearchResult:
        """Rows and scores at both ends."""
        if self._found is None:
            raise RunError("the search runs when the trace block ends: read the result after it")
        return self._found

    def _hits(self, rows: np.ndarray, scores: np.ndarray) -> list[Hit]:
        # An approximate index that finds fewer than k fills up with row -1.
        found = [(int(row), float(score)) for row, score in zip(rows, scores) if row >= 0]
        if self._store.offsets is None:
            return [Hit(row, score, self._store.data(row)) for row, score in found]
        return [Hit(row, score, self._store.data(row), *self._store.document(row)) for row, score in found]


class Attributor:
    """A gradient store that answers which training rows matter.

    Example::

        attr = Attributor("runs/quickstart", device="cpu", unit_norm=True)
        with attr.trace(model.base_model, 5) as result:
            model(query_tokens, labels=query_tokens).loss.backward()
            model.zero_grad()
        result.scores, result.indices     # [1, 5] each
        result.proponents(0)[0].text

        # millions of rows: an approximate index, memory-mapped
        attr = Attributor("runs/quickstart", faiss_cfg=FaissConfig("IVF1,SQfp16", mmap_index=True))

    Args:
        index: a run folder, or an opened store.
        device: where the search computes its products; ``"auto"`` takes a GPU where there is one. Query gradients are
            computed where the traced model lies.
        unit_norm: cosine (grad-cos) instead of dot product (grad-dot).
        faiss_cfg: search by FAISS, on the CPU, instead of exactly. The index is made at the first search, kept beside
            the store and found again (extra ``gradstore[faiss]``).

    Raises:
        ModelError: no such device.
    """

    def __init__(
        self,
        index: str | Path | GradientStore,
        device: str = "cpu",
        unit_norm: bool = False,
        faiss_cfg: FaissConfig | None = None,
    ) -> None:
        self.store = index if isinstance(index, GradientStore) else GradientStore.open(index)
        self.device = pick_device(device)
        self.plan = plan_of(self.store)
        self.method = method_named("grad-cos" if unit_norm else "grad-dot")
        self.faiss_cfg = faiss_cfg
        self._metric: Literal["dot", "cos"] = "cos" if unit_norm else "dot"

    def search(
        self,
        queries: Tensor | np.ndarray | Mapping[str, Tensor],
        k: int = 5,
        *,
        modules: str | Sequence[str] | None = None,
        reverse: bool = False,
    ) -> Attribution:
        """The rows with the highest and lowest scores.

        Args:
            queries: gradients ``[q, width]`` in the store's columns, or module name to ``[q, *shape]`` as a
                :class:`gradcore.GradientCollector` gives them.
            k: rows a query.
            modules: patterns of the modules that count; all by default.
            reverse: let ``scores`` and ``indices`` be the opponents.

        Raises:
            RunError: gradients of a module are missing.
        """
        names = select_modules(self.plan.columns, modules) if modules is not None else None
        result = Attribution(self.store, reverse)
        result._found = self._search(self._matrix(queries), k, names)
        return result

    def _search(self, queries: np.ndarray, k: int, modules: Sequence[str] | None) -> SearchResult:
        if self.faiss_cfg is not None:
            index = FaissIndex.build(self.store, self.faiss_cfg, metric=self._metric, modules=modules)
            return index.search(queries, k)
        if self.device.type != "cpu":
            return search_on(self.device, self.store, queries, k, metric=self._metric, modules=modules)
        return self.method.search(self.store, queries, k, modules)

    @contextmanager
    def trace(
        self, module: nn.Module, k: int = 5, *, modules: str | Sequence[str] | None = None, reverse: bool = False
    ) -> Iterator[Attribution]:
        """Search with the gradients of the backward passes run inside the block; every example is a query.

        Several backward passes in one block are several queries, in their order. The scale of a dot product follows the
        loss that was differentiated: ``model(...).loss`` is a mean over tokens.

        Args:
            module: the base model whose gradients the store holds (``model.base_model``), or the whole model, which is
                needed where the store holds those of the output embedding, too. Of one that PEFT has wrapped, either
                is the wrapper or what is inside.
            k, modules, reverse: as for :meth:`search`.

        Raises:
            RunError: other weights than those the store was made from.
        """
        base, outside = transformer_of(module), output_modules(module)
        require_same_weights(self.plan, base, str(self.store.path), outside)
        result = Attribution(self.store, reverse)
        with GradientCollector(base, self.plan, outside=outside) as collector:
            yield result
        result._found = self.search(collector.rows, k, modules=modules)._found

    def _matrix(self, queries: Tensor | np.ndarray | Mapping[str, Tensor]) -> np.ndarray:
        if isinstance(queries, Mapping):
            missing = [name for name in self.plan.columns if name not in queries]
            if missing:
                raise RunError(f"the query has no gradient for {missing[0]} ({len(missing)} modules are missing)")
            queries = torch.cat([queries[name].flatten(1) for name in self.plan.columns], dim=1)
        if isinstance(queries, Tensor):
            queries = queries.detach().float().cpu().numpy()
        return np.ascontiguousarray(queries, dtype=np.float32)


def record_text(record: Mapping[str, Any]) -> str:
    """What to show of a record: its column ``text``, or all its columns of text in order."""
    if isinstance(record.get("text"), str):
        return record["text"]
    return "".join(str(value) for value in record.values() if isinstance(value, str))


def require_same_weights(
    plan: CapturePlan,
    module: nn.Module,
    index: str,
    outside: Mapping[str, nn.Module] | None = None,
    *,
    fingerprint: str = "",
) -> None:
    """Raise :class:`RunError` unless the weights of base and output embedding are those the plan was made for.

    Give the ``fingerprint`` where it is known, as of a model whose whole weights are nowhere.
    """
    names = {*dict(module.named_modules()), *(outside or {})}
    uses = (path for planned in plan.modules for path in (planned.path, *planned.tied))
    absent = next((path for path in uses if path not in names), None)
    if absent is not None:
        raise RunError(
            f"{index} was made from another model: this one has no module {absent!r} (where that is the output "
            "embedding, pass the whole model, not its base)"
        )
    if plan.model and plan.model != (fingerprint or model_fingerprint(module)):
        raise RunError(
            f"{index} was made from other weights than these: gradients of different models do not compare. "
            "Use the model named in its configuration, or build an index for this one"
        )
