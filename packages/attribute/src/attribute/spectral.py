"""The spectral basis of a run: fitted to a sample of its rows, kept beside them, found again by whoever asks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from attribute._errors import DataError, RunError
from attribute.batching import assemble, plan_batches
from attribute.data import TokenFile
from attribute.engine import capturing_nothing, evaluating
from attribute.model import LanguageModel
from attribute.normalizing import with_normalizer
from attribute.progress import Progress, Quiet
from gradcore import CapturePlan, GradCoreError, Spectral, SpectralBasis, fit_spectral
from gradstore import GradientStore

BASIS = "basis.safetensors"
SAMPLE_TOKENS = (8_192, 262_144)
"""Least and most tokens of a sample; between them it is a sixteenth of the data."""


def fit_basis(
    model: LanguageModel,
    tokens: TokenFile,
    plan: CapturePlan,
    *,
    budget: int = 4096,
    equal: bool = False,
    progress: Progress | None = None,
) -> CapturePlan:
    """The plan with its spectral sketch fitted to a sample of the rows, floats shared by the modules by λ.

    Args:
        model: the model.
        tokens: the rows that will be collected, or others like them.
        plan: with a :class:`gradcore.Spectral` that says how many floats a module has on average.
        budget: padded tokens a batch.
        equal: as many floats for every module instead.
        progress: told of both passes.

    Raises:
        DataError: no row has a token with a loss.
    """
    progress = progress or Quiet()
    sketch = plan.sketch
    assert isinstance(sketch, Spectral)
    lengths = tokens.lengths
    rows = shuffled_rows(tokens, plan)
    if not len(rows):
        raise DataError("a spectral sketch is fitted to rows with a loss, and there are none: use --sketch tensor")
    least, most = SAMPLE_TOKENS
    wanted = min(most, max(least, int(lengths.sum()) // 16))
    rows = np.sort(rows[: int(np.searchsorted(lengths[rows].cumsum(), wanted)) + 1])

    def run() -> None:
        measure = capturing_nothing(model, plan)
        with evaluating(model):
            for batch in plan_batches(lengths, rows, budget):
                measure(assemble(tokens, batch, model.device))
                progress.advance(int(lengths[batch].sum()))

    progress.start("fit the sketch", 2 * int(lengths[rows].sum()), "tokens")
    total = 0 if equal else sum(min(sketch.floats, each.out_features * each.in_features) for each in plan.modules)
    fitted = fit_spectral(
        model.base, plan, run, floats=sketch.floats, total=total, seed=sketch.seed, outside=model.outside
    )
    progress.stop()
    return fitted


def shuffled_rows(tokens: TokenFile, plan: CapturePlan) -> np.ndarray:
    """Rows with a loss in an order drawn by the sketch's seed: a basis is fitted to the first of them."""
    rows = np.array([row for row in range(len(tokens)) if tokens.labelled(row).any()], dtype=np.int64)
    return np.random.default_rng(getattr(plan.sketch, "seed", 0)).permutation(rows)


def plan_of(store: GradientStore) -> CapturePlan:
    """The capture plan a store was made with, able to capture."""
    if not isinstance(store.plan, dict) or "capture" not in store.plan:
        raise RunError(f"{store.path} holds a gradient store that no build made: it has no capture plan")
    plan = with_normalizer(CapturePlan.from_dict(store.plan["capture"]), Path(store.path))
    return with_basis(plan, Path(store.path))


def save_basis(path: Path, plan: CapturePlan) -> None:
    """Write the basis of a plan into the run folder; there is nothing to write for other sketches."""
    from safetensors.torch import save_file

    if isinstance(plan.sketch, Spectral) and plan.sketch.basis is not None:
        aside = path / f"{BASIS}.tmp"
        save_file(plan.sketch.basis.tensors(), aside)
        os.replace(aside, path / BASIS)


def with_basis(plan: CapturePlan, path: Path) -> CapturePlan:
    """The plan of a run, able to capture: its spectral basis is read from the folder.

    Raises:
        RunError: the basis is missing, or another than the run was made with.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not isinstance(plan.sketch, Spectral):
        return plan
    try:
        basis = SpectralBasis.from_tensors(load_file(path / BASIS))
        return replace(plan, sketch=plan.sketch.with_basis(basis))
    except FileNotFoundError:
        raise RunError(
            f"{path} was made with a spectral sketch, whose basis {BASIS} is missing: copy it there"
        ) from None
    except (SafetensorError, GradCoreError) as error:
        raise RunError(f"{path / BASIS} is not the basis of this run: {error}") from error
