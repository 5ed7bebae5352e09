"""One pass, many sinks: batches run through the model under a collector, and every sink sees each block of rows.

What can be done once a run is: hooks, sketch matrices and the row buffer outlive the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from attribute._errors import ModelError
from attribute.batching import Batch, assemble, plan_batches
from attribute.data import TokenFile
from attribute.model import LanguageModel
from attribute.processes import current
from attribute.progress import Progress, Quiet, scaled
from gradcore import IGNORE, CapturePlan, GradientCollector, Identity, ModuleGradient
from gradstore import StoreWriter


@dataclass(frozen=True)
class RowBlock:
    """What one batch yields.

    Attributes:
        rows: row numbers ``[n]``.
        gradients: ``[n, plan.width]``, valid until the next batch; zero for rows without loss.
        losses: ``[n]`` in nats.
        tokens: labelled tokens ``[n]``.
    """

    rows: np.ndarray
    gradients: Tensor
    losses: Tensor
    tokens: np.ndarray


Deal = Literal["nothing", "windows", "batches"]
"""What the processes of a run share out: whole windows, for sinks that write each somewhere; batches, for sums over
all; or nothing, so that each does everything."""

Measure = Callable[[Batch], RowBlock]
"""Runs a batch through the model and says what came of it."""


class Sink(Protocol):
    """Consumes the blocks of a pass; a window is a range of rows that arrives before the next one begins."""

    def open(self, index: int, start: int, stop: int) -> None:
        """Rows ``[start, stop)`` come next, in any order; rows without loss do not come at all."""

    def add(self, block: RowBlock) -> None:
        """One block of the open window."""

    def close(self) -> None:
        """The window is complete."""


def run_pass(
    model: LanguageModel,
    tokens: TokenFile,
    plan: CapturePlan,
    windows: Iterable[tuple[int, int, int]],
    sinks: Sequence[Sink],
    *,
    budget: int,
    per_position: bool = False,
    progress: Progress | None = None,
    deal: Deal = "nothing",
) -> None:
    """Run the rows of every window ``(index, start, stop)`` and hand the blocks to the sinks.

    Args:
        model: the model; it runs in eval mode and is left as it was found.
        tokens: the rows.
        plan: what to capture.
        windows: which rows, in which portions; batches never cross a window.
        sinks: who gets the blocks.
        budget: padded tokens a batch.
        per_position: a gradient a token, ``[n, s, plan.width]`` in the blocks.
        progress: advanced by tokens.
        deal: what the processes of a run share out, see :data:`Deal`.

    Raises:
        ModelError: a loss is not finite; the row is named.
    """
    with model.collector(plan, per_position=per_position) as collector:
        measure = capturing(model, collector, plan)
        run_windows(model, tokens, windows, sinks, measure, budget=budget, progress=progress, deal=deal)


def run_windows(
    model: LanguageModel,
    tokens: TokenFile,
    windows: Iterable[tuple[int, int, int]],
    sinks: Sequence[Sink],
    measure: Measure,
    *,
    budget: int,
    progress: Progress | None = None,
    deal: Deal = "nothing",
) -> None:
    """:func:`run_pass` with another measurement than a collector's rows: a batch is the business of ``measure``."""
    advance = (progress or Quiet()).advance
    planned: Iterable[_Window] = (_Window.of(tokens, window, budget) for window in windows)
    if deal != "nothing" and current().world > 1:
        everything = list(planned)
        planned = _own_share(everything, tokens, deal)
        advance = scaled(advance, *(sum(each.tokens(tokens) for each in some) for some in (planned, everything)))
    steps = 0
    with evaluating(model):
        for window in planned:
            for sink in sinks:
                sink.open(window.index, window.start, window.stop)
            advance(window.without)  # zero without a forward pass
            for rows in window.batches:
                block = measure(assemble(tokens, rows, model.device))
                for sink in sinks:
                    sink.add(block)
                advance(int(tokens.lengths[rows].sum()))
            for sink in sinks:
                sink.close()
            steps += len(window.batches)
        if deal != "nothing":
            keep_step(model, tokens, steps, measure)


def keep_step(model: LanguageModel, tokens: TokenFile, steps: int, measure: Callable[[Batch], object]) -> None:
    """Run idle batches until the process with most batches is done: a model spread over processes needs all of them."""
    if not model.sharded:
        return
    left = current().most(steps) - steps
    row = next((row for row in range(len(tokens)) if tokens.labelled(row).any()), 0)
    for _ in range(left):
        measure(replace(assemble(tokens, [row], model.device), idle=True))


@dataclass(frozen=True)
class _Window:
    """Rows ``[start, stop)``, those with a loss in batches; ``without`` is the tokens of the others."""

    index: int
    start: int
    stop: int
    batches: list[np.ndarray]
    without: int

    @classmethod
    def of(cls, tokens: TokenFile, window: tuple[int, int, int], budget: int) -> _Window:
        index, start, stop = window
        empty = np.array([not tokens.labelled(row).any() for row in range(start, stop)], dtype=bool)
        rows = np.arange(start, stop)
        batches = plan_batches(tokens.lengths, rows[~empty], budget)
        return cls(index, start, stop, batches, int(tokens.lengths[rows[empty]].sum()))

    def tokens(self, tokens: TokenFile) -> int:
        """Tokens of all its rows."""
        return self.without + sum(int(tokens.lengths[rows].sum()) for rows in self.batches)


def _own_share(windows: list[_Window], tokens: TokenFile, deal: Deal) -> list[_Window]:
    """What this process does of them; whoever adds up may get some of a window's batches."""
    here = current()
    if deal == "windows":
        costs = [sum(padded(tokens, rows) for rows in window.batches) for window in windows]
        return [windows[place] for place in here.deal(costs)]
    batches = [(place, rows) for place, window in enumerate(windows) for rows in window.batches]
    mine = dict[int, list[np.ndarray]]()
    for number in here.deal([padded(tokens, rows) for _, rows in batches]):
        place, rows = batches[number]
        mine.setdefault(place, []).append(rows)
    return [replace(windows[place], batches=found, without=0) for place, found in mine.items()]


def padded(tokens: TokenFile, rows: np.ndarray) -> int:
    """What a batch costs: its tokens with the padding."""
    return len(rows) * int(tokens.lengths[rows].max())


def capturing(model: LanguageModel, collector: GradientCollector, plan: CapturePlan) -> Measure:
    """Forward, backward, and the rows that the collector has then."""

    def measure(batch: Batch) -> RowBlock:
        losses = finite_losses(model, batch, plan)
        losses.sum().backward()
        found = collector.take()
        if collector.per_position:
            found = by_position(found, batch)
        return RowBlock(batch.rows, found, losses.detach(), labelled_tokens(batch))

    return measure


def capturing_nothing(model: LanguageModel, plan: CapturePlan) -> Measure:
    """Forward and backward for somebody else's hooks; the blocks hold losses only."""

    def measure(batch: Batch) -> RowBlock:
        losses = finite_losses(model, batch, plan)
        losses.sum().backward()
        return RowBlock(batch.rows, losses.new_empty(len(losses), 0), losses.detach(), labelled_tokens(batch))

    return measure


def by_position(found: Tensor, batch: Batch) -> Tensor:
    """What each position gave, ``[n·s, columns]``, as ``[n, s, columns]``.

    Raises:
        ModelError: a module saw another number of positions than there are tokens.
    """
    n, s = batch.input_ids.shape
    if len(found) != n * s:
        raise ModelError(
            f"some module saw {len(found) // n} positions in rows of {s} tokens: it has no gradient of each token "
            "(--modules chooses others)"
        )
    return found.unflatten(0, (n, s))


def finite_losses(model: LanguageModel, batch: Batch, plan: CapturePlan) -> Tensor:
    """Losses ``[n]`` of a batch as the plan measures them, times the rows' weights where they have some.

    Raises:
        ModelError: one is not finite; the row is named.
    """
    losses = model.losses(batch.input_ids, batch.labels, plan.reduction, plan.loss)
    finite = losses.detach().isfinite()
    if not finite.all():
        row = int(batch.rows[int((~finite).nonzero()[0])])
        raise ModelError(
            f"row {row} has loss {losses[~finite][0].item()}: the model overflows on it (--precision fp32?)"
        )
    return losses if batch.weights is None else losses * batch.weights


def labelled_tokens(batch: Batch) -> np.ndarray:
    """Tokens with a loss of each row ``[n]``."""
    return (batch.labels != IGNORE).sum(1).cpu().numpy()


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Dropout off and all weights frozen for the pass, the head's too, and everything put back afterwards."""
    training = [module for module in model.model.modules() if module.training]
    trainable = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    model.model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


class MatrixSink:
    """Gathers what a window's rows gave, ``[n, columns]``, and hands it to a writer as one shard.

    With ``offsets`` blocks hold ``[n, s, columns]`` and a row of the store is a token: a document may reach into the
    neighbouring shards, and is then run for each of them.
    """

    def __init__(self, writer: StoreWriter, offsets: np.ndarray | None = None) -> None:
        self._writer = writer
        self._offsets = offsets
        self._index = self._start = 0
        self._rows = np.empty((0, writer.manifest.width), dtype=np.float32)

    def open(self, index: int, start: int, stop: int) -> None:
        """A new shard, zero until blocks arrive."""
        self._index = index
        self._start, end = self._writer.manifest.span(index)
        self._rows = np.zeros((end - self._start, self._writer.manifest.width), dtype=np.float32)

    def add(self, block: RowBlock) -> None:
        """Put the block where it belongs; of tokens, as far as they are of this shard."""
        found = block.gradients.float().cpu().numpy()
        if self._offsets is None:
            self._rows[block.rows - self._start] = found
            return
        for document, rows in zip(block.rows, found):
            first, last = (int(self._offsets[document + each]) - self._start for each in (0, 1))
            start, stop = max(first, 0), min(last, len(self._rows))
            self._rows[start:stop] = rows[start - first : stop - first]

    def close(self) -> None:
        """Write the shard."""
        self._writer.write(self._index, self._rows)


def document_windows(tokens: TokenFile, spans: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Ranges of tokens ``(index, start, stop)`` as the ranges of documents that have some of them."""
    return [
        (
            index,
            int(np.searchsorted(tokens.offsets, start, side="right")) - 1,
            int(np.searchsorted(tokens.offsets, stop, side="left")),
        )
        for index, start, stop in spans
    ]


class StoreSink:
    """Gathers a window's rows and hands them to the writer as one shard."""

    def __init__(self, writer: StoreWriter, width: int) -> None:
        self._writer = writer
        self._width = width
        self._window = (0, 0, 0)
        self._rows = np.empty((0, width), dtype=np.float32)
        self._losses = self._tokens = np.empty(0)

    def open(self, index: int, start: int, stop: int) -> None:
        """A new shard, zero until blocks arrive."""
        self._window = (index, start, stop)
        self._rows = np.zeros((stop - start, self._width), dtype=np.float32)
        self._losses = np.zeros(stop - start, dtype=np.float32)
        self._tokens = np.zeros(stop - start, dtype=np.int32)

    def add(self, block: RowBlock) -> None:
        """Put the block's rows where they belong."""
        places = block.rows - self._window[1]
        self._rows[places] = block.gradients.float().cpu().numpy()
        self._losses[places] = block.losses.float().cpu().numpy()
        self._tokens[places] = block.tokens

    def close(self) -> None:
        """Write the shard."""
        self._writer.write(self._window[0], self._rows, {"loss": self._losses, "tokens": self._tokens})


class MemorySink:
    """Keeps all rows in memory: queries, small sets, tests."""

    def __init__(self, rows: int, width: int) -> None:
        self.gradients = np.zeros((rows, width), dtype=np.float32)
        self.losses = np.zeros(rows, dtype=np.float32)

    def open(self, index: int, start: int, stop: int) -> None:
        """Nothing to prepare."""

    def add(self, block: RowBlock) -> None:
        """Copy the block into place."""
        self.gradients[block.rows] = block.gradients.float().cpu().numpy()
        self.losses[block.rows] = block.losses.float().cpu().numpy()

    def close(self) -> None:
        """Nothing to finish."""


def gradients_of(model: LanguageModel, tokens: TokenFile, plan: CapturePlan, budget: int = 4096) -> np.ndarray:
    """Gradients of all rows at once, ``[rows, plan.width]`` float32."""
    sink = MemorySink(len(tokens), plan.width)
    with torch.enable_grad():
        run_pass(model, tokens, plan, [(0, 0, len(tokens))], [sink], budget=budget)
    return sink.gradients


def factors_of(model: LanguageModel, batch: Batch, plan: CapturePlan) -> dict[str, ModuleGradient]:
    """Whole gradients of a batch by module, not multiplied out, whatever the plan's sketch."""
    held: dict[str, list[ModuleGradient]] = {}

    def hold(gradient: ModuleGradient) -> None:
        held.setdefault(gradient.name, []).append(gradient)

    with torch.enable_grad(), evaluating(model), model.collector(replace(plan, sketch=Identity()), factors=hold):
        finite_losses(model, batch, plan).sum().backward()
    return {name: ModuleGradient.joined(parts) for name, parts in held.items()}
