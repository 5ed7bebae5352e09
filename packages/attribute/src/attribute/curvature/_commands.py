"""What ``trace preconditioners`` and ``trace hessian`` do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from attribute._errors import AttributionError, RunError
from attribute.config import IndexConfig
from attribute.curvature._fit import fit_kronecker
from attribute.curvature._gram import Gram, GramSums, gram_of_store
from attribute.curvature._kronecker import Kronecker
from attribute.curvature._sidecar import exists
from attribute.data import TokenFile, shared_source
from attribute.engine import run_pass
from attribute.index import announce, tokenise
from attribute.model import LanguageModel, load_tokenizer, model_of
from attribute.normalizing import save_normalizer, shared_normalizer
from attribute.processes import current
from attribute.progress import Progress, Quiet
from attribute.run import scratch_beside
from gradcore import Spectral
from gradstore import GradientStore

_STRETCH = 64  # neighbouring rows sampled together, so that they can share a batch


def fit_preconditioners(
    path: str | Path,
    config: IndexConfig | None = None,
    *,
    index: str | Path = "",
    joint: bool = False,
    sample: int = 10_000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Gram:
    """Fit the second moment of a dataset's sketched gradients, without keeping them, or that of an index's rows.

    Args:
        path: where the sidecar goes.
        config: model, data and sketch.
        index: take the rows of this index instead; then no model is run.
        joint: one matrix over all modules instead of one a module.
        sample: at most about so many rows; 0 takes all.
        overwrite: replace a curvature that exists.
        progress: told of the pass.
    """
    _refuse_existing(path, overwrite)
    here = current()
    if index:

        def of_index() -> Gram:
            gram = gram_of_store(GradientStore.open(index), joint=joint, sample=sample)
            gram.save(path, source=str(index))
            return gram

        return here.from_first(of_index)
    config, progress = (config or IndexConfig()).two_sided(), progress or Quiet()
    if isinstance(config.sketch, Spectral):
        raise AttributionError("a spectral basis belongs to an index: build one and fit its rows (--index RUN)")
    with _opened(path, config, progress) as (model, tokens):
        plan = model.plan(config)
        announce(model, plan, progress)
        plan = replace(plan, normalizer=shared_normalizer(model, tokens, plan, config, progress))
        sums = GramSums(plan, joint=joint)
        windows = _windows(len(tokens), sample)
        total = sum(int(tokens.offsets[stop] - tokens.offsets[start]) for _, start, stop in windows)
        progress.start("gradients", total, "tokens")
        budget = config.token_batch_size
        run_pass(model, tokens, plan, windows, [sums], budget=budget, progress=progress, deal="batches")
        progress.stop()
        sums.share(here)

        def finished() -> Gram:
            gram = sums.finish()
            save_normalizer(Path(path), plan.normalizer)
            gram.save(path, config=config.to_dict(), tokens=tokens.digest, head=model.head_fingerprint())
            return gram

        return here.from_first(finished)


def fit_hessian(
    path: str | Path,
    config: IndexConfig,
    method: str = "ekfac",
    *,
    labels: str = "sampled",
    seed: int = 0,
    sample: int = 0,
    partitions: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Kronecker:
    """Fit K-FAC, EK-FAC, TK-FAC or Shampoo factors over a dataset; the arguments are those of :func:`fit_kronecker`.

    Factors are those of whole gradients unless the configuration asks for a sketch.
    """
    _refuse_existing(path, overwrite)
    progress = progress or Quiet()
    if not config.sketch_kind and config.projection_dim is None:
        config = replace(config, projection_dim=0)
    with _opened(path, config, progress) as (model, tokens):
        plan = model.plan(config)
        announce(model, plan, progress)
        found = fit_kronecker(
            model,
            tokens,
            plan,
            method,
            labels=labels,
            seed=seed,
            sample=sample,
            partitions=partitions,
            budget=config.token_batch_size,
            progress=progress,
        )
        if current().first:
            found.save(path, config=config.to_dict(), tokens=tokens.digest, head=model.head_fingerprint(), seed=seed)
    return found


def _windows(rows: int, sample: int) -> list[tuple[int, int, int]]:
    if not sample or sample >= rows:
        return [(0, 0, rows)]
    stretches = -(-sample // _STRETCH)
    starts = np.unique(np.linspace(0, max(0, rows - _STRETCH), stretches).astype(int) // _STRETCH * _STRETCH)
    return [(number, int(start), min(int(start) + _STRETCH, rows)) for number, start in enumerate(starts)]


@contextmanager
def _opened(path: str | Path, config: IndexConfig, progress: Progress) -> Iterator[tuple[LanguageModel, TokenFile]]:
    source = shared_source(config.data)
    tokenizer = load_tokenizer(config.tokenizer or config.model, config.revision)
    model = model_of(config)
    with scratch_beside(Path(path)) as scratch:
        yield model, tokenise(scratch, source, tokenizer, config, model, progress)


def _refuse_existing(path: str | Path, overwrite: bool) -> None:
    if not current().first:
        return
    if Path(path).is_file():
        raise RunError(f"{path} is a file, not a folder")
    if exists(path) and not overwrite:
        raise RunError(f"{path} holds a curvature already: --overwrite replaces it")
