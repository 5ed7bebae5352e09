"""The second moment of sketched gradients, R = E_rows[φ φᵀ], per module or of all modules together.

TrackStar's R (Chang et al. 2024, section 3) and TRAK's ΦᵀΦ (Park et al. 2023, eq. 14) in one type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribute._errors import AttributionError, RunError
from attribute.curvature._inversion import Inversion
from attribute.curvature._sidecar import save_tensors
from attribute.engine import RowBlock
from attribute.processes import Processes
from gradcore import CapturePlan
from gradstore import GradientStore

JOINT = "*"
_LARGEST = 8192  # floats of a block: its matrix is 0.5 GB in float64
_BLOCK_ROWS = 2048


@dataclass(frozen=True)
class Gram:
    """Eigendecompositions of second moments.

    Example::

        gram = gram_of_store(GradientStore.open("runs/index"))
        gram.apply(queries, Inversion("damped", 0.1))       # [q, width]: queries times H⁻¹

    Attributes:
        plan: what the columns are.
        rows: rows with a gradient that were averaged over.
        values: block → eigenvalues ``[d]`` ascending, float64; the block of all modules is ``"*"``.
        vectors: block → eigenvectors ``[d, d]`` in columns, float64.
    """

    plan: CapturePlan
    rows: int
    values: Mapping[str, Tensor]
    vectors: Mapping[str, Tensor]

    @classmethod
    def of(cls, plan: CapturePlan, rows: int, moments: Mapping[str, Tensor]) -> Gram:
        """Decompose moments ``[d, d]``, each symmetrised first."""
        values, vectors = dict[str, Tensor](), dict[str, Tensor]()
        for name, moment in moments.items():
            if not moment.isfinite().all():
                raise AttributionError(f"the second moment of {name} is not finite: some gradient overflowed")
            values[name], vectors[name] = torch.linalg.eigh((moment + moment.T) / 2)
            values[name] = values[name].clamp(min=0)
        return cls(plan, rows, values, vectors)

    @property
    def joint(self) -> bool:
        """Whether all modules are one block."""
        return JOINT in self.values

    def moment(self, name: str) -> Tensor:
        """The matrix of one block, put together again."""
        return (self.vectors[name] * self.values[name]) @ self.vectors[name].T

    def apply(self, gradients: np.ndarray, inversion: Inversion) -> np.ndarray:
        """Rows ``[n, width]`` times H⁻¹ (or H^-½), block by block."""
        if gradients.shape[1] != self.plan.width:
            raise RunError(f"gradients have {gradients.shape[1]} columns, the curvature has {self.plan.width}")
        out = np.empty(gradients.shape, dtype=np.float32)
        for name, matrix in self.matrices(inversion).items():
            columns = self._columns(name)
            out[:, columns] = gradients[:, columns] @ matrix
        return out

    def matrices(self, inversion: Inversion) -> dict[str, np.ndarray]:
        """The symmetric matrix ``[d, d]`` of each block that multiplies rows, float32."""
        found = dict[str, np.ndarray]()
        for name, values in self.values.items():
            vectors = self.vectors[name]
            found[name] = ((vectors * inversion.of(values)) @ vectors.T).float().numpy()
        return found

    def transform(self, inversion: Inversion) -> Any:
        """:meth:`apply` over and over with the matrices made once: ``[n, width]`` to ``[n, width]``."""
        matrices = [(self._columns(name), matrix) for name, matrix in self.matrices(inversion).items()]

        def applied(gradients: np.ndarray) -> np.ndarray:
            out = np.empty(gradients.shape, dtype=np.float32)
            for columns, matrix in matrices:
                np.matmul(gradients[:, columns], matrix, out=out[:, columns])
            return out

        return applied

    def mix(self, other: Gram, weight: float) -> Gram:
        """``weight`` · this + (1 − ``weight``) · the other."""
        self.plan.require_equal(other.plan, this="one curvature", that="the other")
        if set(self.values) != set(other.values):
            raise RunError("a joint curvature and one per module cannot be mixed: fit both alike")
        if not 0 <= weight <= 1:
            raise AttributionError(f"the weight of a mixture lies between 0 and 1, not {weight}")
        moments = {name: weight * self.moment(name) + (1 - weight) * other.moment(name) for name in self.values}
        return Gram.of(self.plan, self.rows + other.rows, moments)

    def spectrum(self) -> dict[str, dict[str, float]]:
        """Block → size, largest, mean and smallest eigenvalue, condition number, and stable rank Σl / max l."""
        return {name: spectrum_of(values) for name, values in self.values.items()}

    def save(self, folder: str | Path, **provenance: Any) -> None:
        """Write the sidecar that :func:`load_curvature` reads."""
        tensors = {f"{name}/values": each for name, each in self.values.items()}
        tensors |= {f"{name}/vectors": each for name, each in self.vectors.items()}
        about = {"plan": self.plan.to_dict(), "rows": self.rows, "spectrum": self.spectrum(), **provenance}
        save_tensors(folder, "gram", tensors, about)

    @classmethod
    def from_saved(cls, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Gram:
        """What :meth:`save` wrote."""
        names = [name.removesuffix("/values") for name in tensors if name.endswith("/values")]
        return cls(
            CapturePlan.from_dict(about["plan"]),
            about["rows"],
            {name: tensors[f"{name}/values"] for name in names},
            {name: tensors[f"{name}/vectors"] for name in names},
        )

    def _columns(self, name: str) -> slice:
        return slice(0, self.plan.width) if name == JOINT else self.plan.slices[name]


def spectrum_of(values: Tensor) -> dict[str, float]:
    """Size, extremes, mean, condition number and stable rank of a spectrum."""
    flat = values.double().flatten()
    largest, smallest = flat.max().item(), flat.min().item()
    return {
        "size": flat.numel(),
        "largest": largest,
        "mean": flat.mean().item(),
        "smallest": smallest,
        # JSON has no infinity.
        "condition": min(largest / smallest, 1e300) if smallest > 0 else 1e300,
        "stable_rank": flat.sum().item() / largest if largest > 0 else 0.0,
    }


class GramSums:
    """A second moment while it grows: a sink of a pass, or fed from a store."""

    def __init__(self, plan: CapturePlan, *, joint: bool = False) -> None:
        self._plan = plan
        self._blocks = {JOINT: slice(0, plan.width)} if joint else dict(plan.slices)
        for name, columns in self._blocks.items():
            if (width := columns.stop - columns.start) > _LARGEST:
                raise AttributionError(
                    f"{'all modules together' if joint else name} have {width:,} floats a row: a dense second moment "
                    f"of more than {_LARGEST:,} does not fit. Take a smaller --projection-dim, or trace hessian, which "
                    "keeps factors"
                )
        sizes = {name: columns.stop - columns.start for name, columns in self._blocks.items()}
        self._moments = {name: torch.zeros(size, size, dtype=torch.float64) for name, size in sizes.items()}
        self._rows = 0

    def open(self, index: int, start: int, stop: int) -> None:
        """Nothing to prepare."""

    def add(self, block: RowBlock) -> None:
        """One block of a pass."""
        self.add_rows(block.gradients)

    def close(self) -> None:
        """Nothing to finish."""

    def add_rows(self, rows: Tensor) -> None:
        """Rows ``[n, width]``; those without gradient do not count."""
        rows = rows[rows.any(dim=1)].float()
        self._rows += len(rows)
        for name, columns in self._blocks.items():
            part = rows[:, columns]
            self._moments[name] += (part.T @ part).cpu()

    def share(self, here: Processes) -> None:
        """Add what the other processes of the run have."""
        rows = torch.tensor([self._rows])
        here.sums([*self._moments.values(), rows])
        self._rows = int(rows)

    def finish(self) -> Gram:
        """The mean over the rows, decomposed."""
        if not self._rows:
            raise AttributionError("no row has a gradient: there is no curvature to fit")
        return Gram.of(self._plan, self._rows, {name: each / self._rows for name, each in self._moments.items()})


def gram_of_store(store: GradientStore, *, joint: bool = False, sample: int = 0) -> Gram:
    """The second moment of the rows of a store that have a gradient, from a sweep of the memory map.

    Args:
        store: made by ``trace build``.
        joint: one block over all modules.
        sample: at most so many rows, evenly spaced; 0 takes all.

    Raises:
        AttributionError: a block is too wide for a dense matrix, or no row has a gradient.
    """
    from attribute.spectral import plan_of

    sums = GramSums(plan_of(store), joint=joint)
    stride = max(1, -(-store.rows // sample)) if sample else 1
    for start in range(0, store.rows, _BLOCK_ROWS):
        block = store.block(start, min(start + _BLOCK_ROWS, store.rows))
        sums.add_rows(torch.from_numpy(block[(-start) % stride :: stride]))
    return sums.finish()


def mixing_weight(train: Gram, query: Gram, components: int = 0) -> float:
    """TrackStar's λ, so that in λ R_query + (1 − λ) R_train about ``components`` task directions are marked down.

    All eigenvalues of all modules are pooled and sorted for either side; with s their k-th largest,
    λ = s_train / (s_query + s_train): both parts weigh the same at the k-th (Chang et al. 2024, appendix A.1.3, who
    have k ≈ 1,000 of 65,536 dimensions). ``components`` 0 takes the same share of the dimensions here, unless the
    queries are fewer: then λ is 0, since what R_query would mark down is what each of them asks, not their common task.
    """
    if components < 0:
        raise AttributionError(f"--target-downweight-components must be 0 (in proportion) or positive: {components}")
    total = train.plan.width
    wanted = components or max(1, round(total * 1000 / 65536))
    if not components and query.rows < wanted:
        return 0.0
    k = min(wanted, total) - 1
    pooled = [
        torch.cat([each.flatten() for each in side.values.values()]).sort(descending=True).values
        for side in (train, query)
    ]
    from_train, from_query = pooled[0][k].item(), pooled[1][k].item()
    if from_train + from_query == 0:
        raise AttributionError(
            f"neither side has {k + 1} directions with curvature: lower --target-downweight-components"
        )
    return from_train / (from_query + from_train)


def mixing_note(weight: float, otherwise: str = "") -> str:
    """What to say of a λ; where it is 0 for want of queries, with what to do ``otherwise``."""
    too_few = "" if weight else "; too few queries to tell a task by" + f", {otherwise}" * bool(otherwise)
    return f"λ = {weight:.3f} of the query side in the curvature{too_few}"
