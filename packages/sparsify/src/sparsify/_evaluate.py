"""What a coder keeps of its activations, and what the model keeps of itself with the coder grafted in.

Definitions (libraries disagree, so they stand in every result):

- FVU: Σ‖y − ŷ‖² / Σ‖y − ȳ‖² with the mean over all evaluated tokens; explained variance is 1 − FVU.
- L0: mean number of latents with an activation above 0. Dead: share of latents that never fired.
- Cosine: mean over tokens of cos(y, ŷ).
- CE, KL: nats per predicted token, KL(clean ‖ grafted), fp32 log-softmax over the whole vocabulary.
- Latency: microseconds a token of encoding, decoding and the whole model, medians over batches; of one machine.
- Recovered: (CE_zero − CE_grafted) / (CE_zero − CE_clean); zero and mean ablation replace the hookpoint's output by 0
  or by its mean over all evaluated tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify import _hooks
from sparsify._coder import SparseCoder
from sparsify._end_to_end import logits_of
from sparsify._errors import DataError
from sparsify._files import write_json
from sparsify._progress import Stages, silent
from sparsify._source import OnTheFly

if TYPE_CHECKING:
    from rich.table import Table

Replacement = _hooks.Replacement

DENSITY_EDGES = tuple(i / 4 for i in range(-28, 1))
"""log10 edges of the density histogram: 1e-7 to 1 in quarter decades."""


@dataclass(frozen=True)
class Graft:
    """The model with something in place of one or several hookpoints' outputs."""

    ce: float
    kl: float
    agreement: float
    """Share of positions whose most likely token is the clean model's."""


@dataclass(frozen=True)
class Reconstruction:
    """A coder against the activations themselves."""

    fvu: float
    explained_variance: float
    cosine: float
    l0: float
    dead: float
    density: list[int]
    """Latents per bin of log10 firing frequency (see DENSITY_EDGES); latents that never fired are in none."""


@dataclass(frozen=True)
class Latency:
    """Microseconds a token, the median over batches, on the machine that evaluated."""

    encode: float
    decode: float
    model: float
    """One forward pass of the whole model."""


@dataclass(frozen=True)
class Evaluation:
    """Results by coder; ``grafts`` are missing for models without logits."""

    tokens: int
    clean_ce: float
    reconstruction: dict[str, Reconstruction]
    grafted: dict[str, Graft] = field(default_factory=dict)
    zero: dict[str, Graft] = field(default_factory=dict)
    mean: dict[str, Graft] = field(default_factory=dict)
    recovered: dict[str, float] = field(default_factory=dict)
    together: Graft | None = None
    """Every coder at once, one per hookpoint."""
    latency: dict[str, Latency] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values with the definitions, for JSON."""
        return {**asdict(self), "definitions": (__doc__ or "").partition("\n\n- ")[2].strip()}

    def save(self, path: Path | str) -> None:
        """Write as JSON."""
        write_json(Path(path), self.to_dict())

    def table(self) -> Table:
        """One row per coder, for a terminal."""
        from rich.table import Table

        table = Table(title=f"{self.tokens:,} tokens, clean CE {self.clean_ce:.4f}")
        titles = ("hookpoint", "FVU", "cosine", "L0", "dead", "µs/token", "CE", "KL", "recovered", "CE zero", "CE mean")
        for name in titles:
            table.add_column(name, justify="left" if name == "hookpoint" else "right")
        for name, r in self.reconstruction.items():
            speed = self.latency[name]
            row = [name, f"{r.fvu:.4f}", f"{r.cosine:.4f}", f"{r.l0:.1f}", f"{r.dead:.1%}"]
            row.append(f"{speed.encode + speed.decode:.1f}")
            if name in self.grafted:
                g = self.grafted[name]
                row += [f"{g.ce:.4f}", f"{g.kl:.4f}", f"{self.recovered[name]:.4f}"]
                row += [f"{self.zero[name].ce:.4f}", f"{self.mean[name].ce:.4f}"]
            table.add_row(*row)
        if self.together is not None and len(self.grafted) > 1:
            table.add_row("all together", "", "", "", "", "", f"{self.together.ce:.4f}", f"{self.together.kl:.4f}")
        return table


@contextmanager
def grafted(model: nn.Module, coders: Mapping[str, SparseCoder]) -> Iterator[None]:
    """While open, each hookpoint's output is its coder's reconstruction (a transcoder's, from the module's input).

    >>> with grafted(model, {"layers.3": sae}):  # doctest: +SKIP
    ...     logits = model(tokens).logits
    """
    with _hooks.spliced(model, {name: _replacement(coder) for name, coder in coders.items()}):
        yield


def evaluate(
    model: nn.Module,
    coders: Mapping[str, SparseCoder],
    dataset: Any,
    *,
    batch_size: int = 8,
    max_batches: int | None = None,
    exclude: Sequence[int] = (),
    progress: Stages = silent,
) -> Evaluation:
    """Evaluate coders, by hookpoint, on rows of tokens.

    >>> evaluate(model, {"layers.3": sae}, tokenized, max_batches=20).grafted["layers.3"].kl  # doctest: +SKIP

    Args:
        model: with a language-model head, for CE and KL; without one only reconstructions are judged.
        coders: by hookpoint; ``hookpoint/seedN`` is the N-th coder of one.
        dataset: see `sparsify.data.token_rows`.
        max_batches: stop early.
        exclude: token ids at whose positions activations are neither judged nor replaced.
        progress: called with the stage, batches done, and of how many.

    Raises:
        DataError: no rows, or no token left.
    """
    if not coders:
        raise DataError("there is no coder to evaluate")
    hooks = {name: name.partition("/seed")[0] for name in coders}
    paired = any(coder.cfg.transcode for coder in coders.values())
    source = OnTheFly(model, dataset, list(dict.fromkeys(hooks.values())), transcode=paired, batch_size=batch_size)
    batches = len(source) if max_batches is None else min(max_batches, len(source))
    skip = torch.tensor(list(exclude), dtype=torch.long, device=source.device)
    with torch.no_grad(), _hooks.frozen(model), evaluating(coders):
        sums = {name: _Sums(coder) for name, coder in coders.items()}
        for index in range(batches):
            keep = ~torch.isin(source.tokens(index), skip).flatten()
            if not keep.any():
                raise DataError(f"batch {index}: every token is excluded, so there is nothing to evaluate")
            batch = source.batch(index)
            for name, hook in hooks.items():
                pair = batch[hook]
                sums[name].add((pair.x if coders[name].cfg.transcode else pair.y)[keep].float(), pair.y[keep].float())
            progress("reconstructing", index + 1, batches)
        reconstruction = {name: s.result() for name, s in sums.items()}
        whole = _model_latency(model, source, min(batches, 5))
        latency = {name: Latency(*s.latency(), whole) for name, s in sums.items()}
        bare = Evaluation(next(iter(sums.values())).count, math.nan, reconstruction, latency=latency)
        if not _has_logits(model, source.tokens(0)):
            return bare
        means = {hook: sums[name].mean() for name, hook in hooks.items()}
        return _with_grafts(bare, model, coders, hooks, source, batches, skip, means, progress)


def _with_grafts(
    bare: Evaluation,
    model: nn.Module,
    coders: Mapping[str, SparseCoder],
    hooks: Mapping[str, str],
    source: OnTheFly,
    batches: int,
    skip: Tensor,
    means: Mapping[str, Tensor],
    progress: Stages,
) -> Evaluation:
    plans: dict[tuple[str, str], dict[str, Replacement]] = {}
    for name, hook in hooks.items():
        plans["grafted", name] = {hook: _replacement(coders[name])}
        plans["zero", name] = {hook: lambda x, y: torch.zeros_like(y)}
        plans["mean", name] = {hook: lambda x, y, mean=means[hook]: mean.to(y.dtype).expand_as(y)}
    # The first coder of each hookpoint stands for it.
    plans["together", ""] = {hook: _replacement(coders[name]) for name, hook in reversed(list(hooks.items()))}
    totals = {key: torch.zeros(3, dtype=torch.float64) for key in plans}
    clean_ce, count = 0.0, 0
    for index in range(batches):
        tokens = source.tokens(index)
        keep = ~torch.isin(tokens, skip)[..., None]
        clean = logits_of(_hooks.call(model, tokens))
        clean_ce += float(compare(clean, clean, tokens)[0])
        count += tokens[:, 1:].numel()
        for key, replacements in plans.items():
            with _hooks.spliced(model, {hook: _only(keep, f) for hook, f in replacements.items()}):
                totals[key] += compare(clean, logits_of(_hooks.call(model, tokens)), tokens).cpu()
        progress("grafting", index + 1, batches)
    grafts = {key: Graft(*(total / count).tolist()) for key, total in totals.items()}
    kinds = {kind: {n: g for (k, n), g in grafts.items() if k == kind} for kind in ("grafted", "zero", "mean")}
    ce = clean_ce / count
    recovered = {n: _ratio(kinds["zero"][n].ce - kinds["grafted"][n].ce, kinds["zero"][n].ce - ce) for n in hooks}
    return replace(bare, clean_ce=ce, **kinds, recovered=recovered, together=grafts["together", ""])


def compare(clean: Tensor, other: Tensor, tokens: Tensor, block: int = 256) -> Tensor:
    """Σ over predicted positions of (CE of ``other``, KL(clean ‖ other), agreement), fp64.

    Blocks of positions, so that no second (rows, tokens, vocabulary) tensor in fp32 is ever made.
    """
    labels = tokens[:, 1:].flatten()
    p, q = clean[:, :-1].flatten(0, 1), other[:, :-1].flatten(0, 1)
    total = torch.zeros(3, dtype=torch.float64 if p.device.type != "mps" else torch.float32, device=p.device)
    for s in range(0, len(labels), block):
        part = slice(s, s + block)
        log_p, log_q = p[part].float().log_softmax(-1), q[part].float().log_softmax(-1)
        total[0] -= log_q.gather(1, labels[part, None]).sum()
        total[1] += (log_p.exp() * (log_p - log_q)).sum()
        total[2] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    return total


class _Sums:
    """Running fp64 sums of one coder, so that any number of batches gives what one would."""

    def __init__(self, coder: SparseCoder) -> None:
        self.coder = coder
        self.wide = torch.float32 if coder.device.type == "mps" else torch.float64
        self.total = torch.zeros(coder.d_out, dtype=self.wide, device=coder.device)
        self.square = self.error = self.cosine = 0.0
        self.fired = torch.zeros(coder.num_latents, dtype=torch.long, device=coder.device)
        self.count = 0
        self.seconds: list[tuple[float, float]] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        began = _now(x)
        acts, indices, _ = self.coder.encode(x)
        encoded = _now(x)
        out = self.coder.decode(acts, indices)
        self.seconds.append(((encoded - began) / len(x), (_now(x) - encoded) / len(x)))
        out = out if self.coder.W_skip is None else out + x.to(out.dtype) @ self.coder.W_skip.T
        out, y = out.to(self.wide), y.to(self.wide)
        self.total += y.sum(0)
        self.square += float(y.square().sum())
        self.error += float((y - out).square().sum())
        self.cosine += float(torch.cosine_similarity(y, out, dim=-1).sum())
        self.fired.scatter_add_(0, indices.flatten(), (acts > 0).flatten().long())
        self.count += len(y)

    def mean(self) -> Tensor:
        return self.total / self.count

    def latency(self) -> tuple[float, float]:
        encode, decode = zip(*self.seconds)
        return 1e6 * median(encode), 1e6 * median(decode)

    def result(self) -> Reconstruction:
        fvu = _ratio(self.error, self.square - float(self.total.square().sum()) / self.count)
        density = (self.fired[self.fired > 0].double().cpu() / self.count).log10().clamp(DENSITY_EDGES[0], 0)
        histogram = torch.histogram(density, torch.tensor(DENSITY_EDGES, dtype=torch.float64)).hist
        return Reconstruction(
            fvu=fvu,
            explained_variance=1 - fvu,
            cosine=self.cosine / self.count,
            l0=float(self.fired.sum()) / self.count,
            dead=float((self.fired == 0).double().mean()),
            density=histogram.long().tolist(),
        )


def _model_latency(model: nn.Module, source: OnTheFly, batches: int) -> float:
    seconds: list[float] = []
    for index in range(batches):
        tokens = source.tokens(index)
        began = _now(tokens)
        _hooks.call(model, tokens)
        seconds.append((_now(tokens) - began) / tokens.numel())
    return 1e6 * median(seconds)


def _now(like: Tensor) -> float:
    """The time once everything asked of the tensor's device is done."""
    if like.device.type != "cpu":
        torch.accelerator.synchronize(like.device)
    return time.perf_counter()


def _replacement(coder: SparseCoder) -> Replacement:
    return lambda x, y: coder.reconstruct(x if coder.cfg.transcode and x is not None else y)


def _only(keep: Tensor, replacement: Replacement) -> Replacement:
    return lambda x, y: torch.where(keep, replacement(x, y).to(y.dtype), y)


def _has_logits(model: nn.Module, tokens: Tensor) -> bool:
    try:
        logits = logits_of(_hooks.call(model, tokens[:1]))
    except DataError:
        return False
    # A headless module that returns a bare tensor returns hidden states: too narrow for the vocabulary.
    return logits.shape[-1] > int(tokens.max())


@contextmanager
def evaluating(coders: Mapping[str, SparseCoder]) -> Iterator[None]:
    """Evaluation mode for all coders, put back afterwards."""
    modes = {name: coder.training for name, coder in coders.items()}
    try:
        for coder in coders.values():
            coder.eval()
        yield
    finally:
        for name, mode in modes.items():
            coders[name].train(mode)


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
