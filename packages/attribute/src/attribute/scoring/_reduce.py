"""The gradients of a dataset summed into a query, or one a group: what ``trace reduce`` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attribute._errors import AttributionError, DataError
from attribute.batching import Batch
from attribute.config import IndexConfig
from attribute.data import Source, TokenFile, shared_source
from attribute.engine import Measure, RowBlock, finite_losses, labelled_tokens, run_windows
from attribute.index import announce, budgeted, records_of, source_of, tokenise
from attribute.model import LanguageModel, load_tokenizer, model_of
from attribute.normalizing import save_normalizer, shared_normalizer
from attribute.processes import Processes, current
from attribute.progress import Progress, Quiet
from attribute.run import refuse_finished, remove_run, scratch_beside
from attribute.scoring._config import ReduceConfig
from gradcore import CapturePlan, Identity, ModuleGradient, Spectral
from gradstore import GradientStore, StoreWriter


def reduce_gradients(
    path: str | Path,
    reduce: ReduceConfig,
    config: IndexConfig,
    *,
    model: nn.Module | LanguageModel | None = None,
    data: Source | Any = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_begun: Callable[[], None] | None = None,
) -> GradientStore:
    """Mean or sum of a dataset's gradients, as a store whose rows ``trace score`` takes for queries.

    Example::

        reduce_gradients("runs/query", ReduceConfig("mean"), IndexConfig(model=name, data=questions))
        score_dataset("runs/scores", ScoreConfig("runs/query"), IndexConfig(data=texts))

    Whole gradients, the default, are summed from their factors: no row's gradient is formed, and memory is that of one
    gradient a group.

    Args:
        path: the run folder.
        reduce: mean or sum, unit length, groups.
        config: model, data and what is captured; whole gradients unless it asks for a sketch.
        model, data, tokenizer: what the configuration names, where you have it already.
        overwrite: replace a run that exists.
        progress: told of each stage.
        on_begun: called once the run folder is there.

    Returns:
        The store: a row, or one for each value of ``group_column`` in order of first appearance. Rows without a loss
        (or whose reward is NaN) count for nothing. A row of weight 0 counts in a mean, but not of unit lengths, where
        it has no direction. The data of a row say its group and how many rows it was made of.

    Raises:
        DataError: no such group column; a row whose gradient is zero has no direction.
    """
    progress, path, here = progress or Quiet(), Path(path), current()
    refuse_finished(path, overwrite)
    if not config.sketch_kind and config.projection_dim is None:
        config = replace(config, projection_dim=0)
    if isinstance(config.sketch, Spectral):
        raise AttributionError("a spectral basis belongs to an index: reduce takes --sketch tensor, or whole gradients")
    source = shared_source(config.data) if data is None else data if isinstance(data, Source) else source_of(data)
    if reduce.group_column and reduce.group_column not in source.columns:
        raise DataError(f"{source.name} has no column {reduce.group_column!r}, only {', '.join(source.columns)}")
    if model is None:
        tokenizer = tokenizer or load_tokenizer(config.tokenizer or config.model, config.revision)
        model = model_of(config)
    loaded = model if isinstance(model, LanguageModel) else LanguageModel.wrap(model)
    plan = loaded.plan(config)
    announce(loaded, plan, progress)
    with scratch_beside(path) as scratch:
        tokens = tokenise(scratch, source, tokenizer, config, loaded, progress)
        groups, names = _groups(scratch, tokens, reduce.group_column)
        if overwrite and here.first:
            remove_run(path)
        plan = replace(plan, normalizer=shared_normalizer(loaded, tokens, plan, config, progress))
        shared = budgeted(loaded, tokens, plan, config).sketch if here.first or loaded.sharded else plan.sketch
        plan = replace(plan, sketch=here.from_first(lambda: shared))
        sums = _Sums(plan, groups, len(names), reduce.unit_normalize)
        progress.start("gradients", tokens.total, "tokens")
        with _summing(loaded, plan, sums) as measure, torch.enable_grad():
            everything = [(0, 0, len(tokens))]
            budget = config.token_batch_size
            run_windows(loaded, tokens, everything, [], measure, budget=budget, progress=progress, deal="batches")
        progress.stop()
        sums.share(here)
        found = sums.finish(mean=reduce.method == "mean")
    identity = {
        "capture": plan.to_dict(),
        "head": loaded.head_fingerprint(),
        "tokens": tokens.digest,
        "reduce": reduce.to_dict(),
    }
    if here.first:
        meta = {"config": config.to_dict(), "reduce": reduce.to_dict(), "sign": "positive scores are proponents"}
        with StoreWriter.create(
            path, rows=len(names), columns=plan.columns, plan=identity, meta=meta, side_columns=()
        ) as writer:
            if on_begun is not None:
                on_begun()
            save_normalizer(path, plan.normalizer)
            writer.write_data(
                {
                    "text": f"{reduce.method} of {int(count)} rows{f' of {name}' if name else ''}",
                    "group": name,
                    "rows": int(count),
                }
                for name, count in zip(names, sums.rows)
            )
            for shard, start, stop in writer.pending:
                writer.write(shard, found[start:stop])
    here.barrier()
    return GradientStore.open(path)


def _groups(scratch: Path, tokens: TokenFile, column: str) -> tuple[np.ndarray, list[str]]:
    """The group of every row, and their names."""
    if not column:
        return np.zeros(len(tokens), dtype=np.int64), [""]
    names: dict[str, int] = {}
    groups = [names.setdefault(str(record[column]), len(names)) for record in records_of(scratch)]
    return np.array(groups, dtype=np.int64), list(names)


class _Sums:
    """Weighted sums of gradients by group, in float64."""

    def __init__(self, plan: CapturePlan, groups: np.ndarray, count: int, unit: bool) -> None:
        self._plan, self._groups, self._unit = plan, groups, unit
        self._totals = np.zeros((count, plan.width))
        self.rows = np.zeros(count, dtype=np.int64)

    def add_rows(self, batch: Batch, rows: Tensor) -> None:
        """Sketched gradients ``[n, width]``."""
        rows = rows.double()
        for group, chosen in self._chosen(batch, rows.square().sum(1)):
            self._totals[group] += (chosen @ rows).cpu().numpy()

    def add_factors(self, batch: Batch, gradients: dict[str, ModuleGradient]) -> None:
        """Whole gradients, every module once."""
        squares = torch.zeros((), device=batch.input_ids.device)
        if self._unit:
            squares = torch.stack([each.sq_norm().double() for each in gradients.values()]).sum(0)
        for group, chosen in self._chosen(batch, squares.expand(len(batch.rows))):
            for name, gradient in gradients.items():
                total = gradient.scaled(chosen.float()).sum_over_examples()
                self._totals[group, self._plan.slices[name]] += total.flatten().double().cpu().numpy()

    def share(self, here: Processes) -> None:
        """Add what the other processes of the run have."""
        here.sums([torch.from_numpy(self._totals), torch.from_numpy(self.rows)])

    def finish(self, *, mean: bool) -> np.ndarray:
        """``[groups, width]`` float32."""
        if not np.isfinite(self._totals).all():
            raise AttributionError("the summed gradient is not finite: the model overflows (--precision fp32?)")
        divided = self._totals / np.maximum(self.rows, 1)[:, None] if mean else self._totals
        return divided.astype(np.float32)

    def _chosen(self, batch: Batch, squares: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each group of a batch, and what its rows are multiplied with ``[n]``: 0 for those of other groups."""
        factors = self._factors(batch, squares)
        counted = (factors != 0).cpu().numpy()
        found, counts = np.unique(self._groups[batch.rows[counted]], return_counts=True)
        self.rows[found] += counts
        for group in found:
            yield int(group), torch.from_numpy(self._groups[batch.rows] == group).to(factors.device) * factors

    def _factors(self, batch: Batch, squares: Tensor) -> Tensor:
        """One over each row's length where lengths are to be one; 0 for a row of weight 0, which has no direction."""
        if not self._unit:
            return torch.ones(len(batch.rows), dtype=torch.float64, device=squares.device)
        none = squares <= 0
        silent = torch.zeros_like(none) if batch.weights is None else batch.weights == 0
        if (none & ~silent).any():
            row = int(batch.rows[int((none & ~silent).nonzero()[0])])
            raise DataError(f"row {row} has a loss and no gradient, so no direction: leave --unit-normalize away")
        return torch.where(silent, 0.0, squares.double().clamp(min=1e-300).rsqrt())


@contextmanager
def _summing(model: LanguageModel, plan: CapturePlan, sums: _Sums) -> Iterator[Measure]:
    held: dict[str, list[ModuleGradient]] = {}

    def run(batch: Batch) -> Tensor:
        losses = finite_losses(model, batch, plan)
        losses.sum().backward()
        return losses.detach()

    def nothing(batch: Batch, losses: Tensor) -> RowBlock:
        return RowBlock(batch.rows, losses.new_empty(len(losses), 0), losses, labelled_tokens(batch))

    if isinstance(plan.sketch, Identity):

        def by_factors(batch: Batch) -> RowBlock:
            losses = run(batch)
            if not batch.idle:
                sums.add_factors(batch, {name: ModuleGradient.joined(parts) for name, parts in held.items()})
            held.clear()
            return nothing(batch, losses)

        def hold(gradient: ModuleGradient) -> None:
            held.setdefault(gradient.name, []).append(gradient)

        with model.collector(plan, factors=hold):
            yield by_factors
        return
    with model.collector(plan) as collector:

        def by_rows(batch: Batch) -> RowBlock:
            losses = run(batch)
            rows = collector.take()
            if not batch.idle:
                sums.add_rows(batch, rows)
            return nothing(batch, losses)

        yield by_rows
