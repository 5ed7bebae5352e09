"""Query gradients as a pass needs them: preconditioned, of unit length, by module, a slice at a time."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from attribute._errors import AttributionError, RunError
from attribute.attributor import record_text
from attribute.curvature import Gram, Inversion, Kronecker, load_curvature
from attribute.progress import Progress, Quiet
from attribute.scoring._config import ScoreConfig
from attribute.spectral import plan_of
from gradcore import CapturePlan, Identity, ModuleGradient, Sketch
from gradstore import GradientStore

RESIDENT_FLOATS = 1 << 28
"""Floats of queries in memory."""


class Queries:
    """The queries of a :class:`ScoreConfig`.

    Attributes:
        plan: what rows must be captured as to meet them.
        slices: ranges of queries that are in memory together; one, unless they are more than memory holds.
    """

    def __init__(self, config: ScoreConfig, progress: Progress | None = None) -> None:
        self.config = config
        self.store = GradientStore.open(config.query_path)
        if not self.store.rows:
            raise RunError(f"{config.query_path} has no queries")
        whole = plan_of(self.store)
        if config.modules and whole.sketch.summed:
            raise AttributionError("a global sketch has summed all modules: --modules cannot choose among them")
        self.plan = whole.restrict(list(config.modules)) if config.modules else whole
        self._whole, self._device = whole, torch.device("cpu")
        self._curvature = self._read_curvature(progress or Quiet())
        rows = config.query_rows or max(1, RESIDENT_FLOATS // max(self.plan.width, 1))
        count = 1 if config.score == "mean" else self.store.rows
        self.slices = [(start, min(start + rows, count)) for start in range(0, count, rows)]
        self._block_rows = rows
        self._resident: dict[tuple[str, int], Tensor | ModuleGradient] = {}

    def move_to(self, device: torch.device) -> None:
        """Hand queries out on this device, where the rows come to be."""
        self._device = device

    def __len__(self) -> int:
        return 1 if self.config.score == "mean" else self.store.rows

    @cached_property
    def names(self) -> list[str]:
        """Of the columns of scores."""
        return [self.config.score] if self.config.score != "individual" else [str(n) for n in range(self.store.rows)]

    @cached_property
    def texts(self) -> list[str]:
        """What to show for each column."""
        if self.config.score != "individual":
            return [f"{self.config.score} of {self.store.rows} queries from {self.config.query_path}"]
        return [record_text(self.store.data(row)) for row in range(self.store.rows)]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Queries ``start`` to ``stop`` of the scored columns, ``[q, plan.width]`` float32."""
        if self.config.score == "mean":
            return self._mean[start:stop]
        return self._prepared(start, stop)

    def module(self, name: str, number: int) -> Tensor | ModuleGradient:
        """The queries of slice ``number`` at one module, ``[q, out, in]``; low-rank ones as factors."""
        key = (name, number)
        if key in self._resident:
            return self._resident[key]
        if len(self.slices) > 1:  # only one slice is kept
            self._resident.clear()
        found = torch.from_numpy(self.rows(*self.slices[number]))
        for each, columns in self.plan.slices.items():
            # Every vector and matrix of these queries as [q, out, in]; what a sketch made has its own shape.
            shape = self.plan.shapes[each]
            matrices = found[:, columns].reshape(len(found), shape[0], int(np.prod(shape[1:]))).to(self._device)
            self._resident[each, number] = self._low_rank(each, matrices) if self.config.query_rank else matrices
        return self._resident[key]

    def flat(self, number: int) -> Tensor:
        """The queries of one slice ``[q, plan.width]`` on the device."""
        key = ("", number)
        if key not in self._resident:
            self._resident.clear()
            self._resident[key] = torch.from_numpy(self.rows(*self.slices[number])).to(self._device)
        found = self._resident[key]
        assert isinstance(found, Tensor)
        return found

    @cached_property
    def kept(self) -> float:
        """Least share of a query's squared norm that its low rank keeps."""
        if not self.config.query_rank:
            return 1.0
        shares = []
        for start, stop in self.slices:
            rows = torch.from_numpy(self.rows(start, stop))
            left = torch.zeros(len(rows))
            for name, columns in self.plan.slices.items():
                shape = self.plan.shapes[name]
                matrices = rows[:, columns].reshape(len(rows), shape[0], -1)
                left += torch.linalg.svdvals(matrices)[:, self.config.query_rank :].square().sum(1)
            shares.append(1 - (left / rows.square().sum(1).clamp(min=1e-30)).max().item())
        return min(shares)

    @cached_property
    def empty(self) -> np.ndarray:
        """Which queries have no gradient in these modules, ``[queries]``: they count for nothing."""
        found = np.zeros(self.store.rows, dtype=bool)
        for start in range(0, self.store.rows, self._block_rows):
            stop = min(start + self._block_rows, self.store.rows)
            found[start:stop] = ~self.store.block(start, stop, list(self.plan.slices)).any(axis=1)
        if found.all():
            raise RunError(f"{self.config.query_path}: no query has a gradient in these modules")
        return found

    @cached_property
    def _mean(self) -> np.ndarray:
        total = np.zeros(self.plan.width)
        for start in range(0, self.store.rows, self._block_rows):
            total += self._prepared(start, min(start + self._block_rows, self.store.rows)).sum(0, dtype=np.float64)
        return (total / (~self.empty).sum()).astype(np.float32)[None]

    def _prepared(self, start: int, stop: int) -> np.ndarray:
        if self._curvature is not None:
            found = self._curvature.apply(self.store.block(start, stop), self.config.inversion)
            found = np.concatenate([found[:, self._whole.slices[name]] for name in self.plan.slices], axis=1)
        else:
            found = self.store.block(start, stop, list(self.plan.slices))
        if not np.isfinite(found).all():
            raise RunError(f"{self.config.query_path}: the queries {start} to {stop} hold NaN or infinity")
        if self.config.unit_normalize:
            norms = np.linalg.norm(found, axis=1, keepdims=True)
            found = np.divide(found, norms, out=np.zeros_like(found), where=norms > 0)
        return np.ascontiguousarray(found, dtype=np.float32)

    def _read_curvature(self, progress: Progress) -> Gram | Kronecker | None:
        if not self.config.curvature_path:
            return None
        found = load_curvature(self.config.curvature_path)
        _require_sketch_of(found, self._whole, self.config)
        self._whole.require_equal(found.plan, this="the queries", that=f"the curvature {self.config.curvature_path}")
        _require_invertible(found, self.config.inversion)
        progress.note(f"queries times the inverse curvature of {found.rows:,} rows in {self.config.curvature_path}")
        return found

    def _low_rank(self, name: str, matrices: Tensor) -> Tensor | ModuleGradient:
        """The leading singular directions as factors ``[q, r, out]`` and ``[q, r, in]``, where that is smaller."""
        rank, (_, out, into) = self.config.query_rank, matrices.shape
        if rank * (out + into) >= out * into:
            return matrices
        left, values, right = torch.linalg.svd(matrices, full_matrices=False)
        return ModuleGradient(name, (left[..., :rank] * values[:, None, :rank]).mT, right[:, :rank])


def _require_sketch_of(curvature: Gram | Kronecker, queries: CapturePlan, config: ScoreConfig) -> None:
    """Raise unless a curvature is of gradients that are sketched as the queries are."""
    if curvature.plan.sketch == queries.sketch or curvature.plan.modules != queries.modules:
        return  # whose modules differ is another model's, or of another choice of them
    fit = "trace hessian without --projection-dim fits whole gradients"
    if not isinstance(queries.sketch, Identity):
        fit = f"trace preconditioners RUN --index {config.query_path} fits the rows of an index as they are"
    raise RunError(
        f"the curvature {config.curvature_path} is of {_said(curvature.plan.sketch)}, the queries in "
        f"{config.query_path} are {_said(queries.sketch)}: they cannot be multiplied. {fit}"
    )


def _said(sketch: Sketch) -> str:
    return "whole gradients" if isinstance(sketch, Identity) else f"gradients under {sketch}"


def _require_invertible(curvature: Gram | Kronecker, inversion: Inversion) -> None:
    """Raise now for what would be refused when the first query is multiplied."""
    if inversion.kind != "factored" and inversion.damping:
        return
    if isinstance(curvature, Kronecker):
        for module in curvature.modules.values():
            module.multipliers(inversion)
    else:
        for values in curvature.values.values():
            inversion.of(values)


def require_whole(queries: Queries) -> None:
    """Raise unless the queries are whole gradients."""
    if not isinstance(queries.plan.sketch, Identity):
        raise AttributionError(
            "--query-rank and --attribute-tokens output need queries of whole gradients: "
            "trace reduce --projection-dim 0"
        )
