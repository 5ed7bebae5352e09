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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsify import _hooks
from sparsify._coder import SparseCoder
from sparsify._end_to_end import check_next_tokens, logits_of
from sparsify._errors import DataError, HookpointError, check_number
from sparsify._files import write_json
from sparsify._progress import Stages, silent
from sparsify._source import OnTheFly, check_finite, limited, ordinary, warn_of_end

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

    Raises:
        HookpointError: the model has no such module, or two coders are of one.
    """
    hooks = {name: _hooks.hook_of(name) for name in coders}
    for hook in hooks.values():
        if (names := [name for name in hooks if hooks[name] == hook])[1:]:
            raise HookpointError(f"{' and '.join(names)} would both replace the output of {hook}: graft one of them")
    with _hooks.spliced(model, {hooks[name]: _replacement(hooks[name], coder) for name, coder in coders.items()}):
        yield


def evaluate(
    model: nn.Module,
    coders: Mapping[str, SparseCoder],
    dataset: Any,
    *,
    batch_size: int = 8,
    max_batches: int | None = None,
    exclude: Sequence[int] = (),
    max_norm_ratio: float = 0.0,
    progress: Stages = silent,
) -> Evaluation:
    """Evaluate coders, by hookpoint, on rows of tokens.

    >>> evaluate(model, {"layers.3": sae}, tokenized, max_batches=20).grafted["layers.3"].kl  # doctest: +SKIP

    Args:
        model: with a language-model head, for CE and KL; without one, or on rows that are not token ids, only
            reconstructions are judged.
        coders: by hookpoint; ``hookpoint/seedN`` is the N-th coder of one.
        dataset: see `sparsify.data.token_rows`.
        max_batches: stop early.
        exclude: token ids at whose positions activations are neither judged nor replaced.
        max_norm_ratio: nor are those whose input norm exceeds this multiple of the batch's median; 0 keeps all.
        progress: called with the stage, batches done, and of how many.

    Raises:
        DataError: no rows, no token left, or activations that are not finite.
        HookpointError: the model has no such module.
    """
    if not coders:
        raise DataError("there is no coder to evaluate")
    check_number("max_norm_ratio", max_norm_ratio)
    hooks = {name: _hooks.hook_of(name) for name in coders}
    source = coders_source(model, coders, dataset, batch_size)
    batches = limited(len(source), max_batches)
    left_out = _LeftOut(torch.tensor(list(exclude), dtype=torch.long, device=source.device), max_norm_ratio)
    with torch.no_grad(), _hooks.frozen(model), evaluating(coders):
        sums = {name: _Sums(coder) for name, coder in coders.items()}
        for index in range(batches):
            if not source.reaches(index):
                warn_of_end(source, "so the coders are judged on these")
                batches = index
                break
            batch = source.batch(index)
            for name, hook in hooks.items():
                pair = check_finite(batch[hook], hook, index)
                x = pair.x if coders[name].cfg.transcode else pair.y
                keep = left_out.keep(source.tokens(index), x)
                if keep is not None and not keep.any():
                    raise DataError(f"batch {index}: every token is excluded, so there is nothing to evaluate")
                sums[name].add(*(each.float() if keep is None else each[keep].float() for each in (x, pair.y)))
            progress("reconstructing", index + 1, batches)
        reconstruction = {name: s.result() for name, s in sums.items()}
        whole = _model_latency(model, source, min(batches, 5))
        latency = {name: Latency(*s.latency(), whole) for name, s in sums.items()}
        bare = Evaluation(next(iter(sums.values())).count, math.nan, reconstruction, latency=latency)
        if not _has_logits(model, source.tokens(0)):
            return bare
        check_next_tokens(source.tokens(0))
        means = {hook: sums[name].mean() for name, hook in hooks.items()}
        return _with_grafts(bare, model, coders, hooks, source, batches, left_out, means, progress)


def coders_source(model: nn.Module, coders: Mapping[str, SparseCoder], dataset: Any, batch_size: int) -> OnTheFly:
    """All rows' activations at the coders' hookpoints; inputs too where a transcoder reads them."""
    hooks = {name: _hooks.hook_of(name) for name in coders}
    paired = {hooks[name] for name, coder in coders.items() if coder.cfg.transcode}
    names = list(dict.fromkeys(hooks.values()))
    return OnTheFly(model, dataset, names, transcode=paired, batch_size=batch_size, keep_last=True)


class _LeftOut(NamedTuple):
    """The tokens that are neither judged nor replaced."""

    ids: Tensor
    max_norm_ratio: float

    def keep(self, tokens: Tensor, x: Tensor) -> Tensor | None:
        """Which of the vectors a coder reads, (..., D), are not among them; None where all are judged."""
        keep = None
        if self.ids.numel():
            keep = ~torch.isin(tokens, self.ids)
            if keep.numel() != x.shape[:-1].numel():
                raise DataError(f"{x.shape[:-1].numel()} vectors for {keep.numel()} tokens: leave out exclude_tokens")
            keep = keep.view(x.shape[:-1])
        return ordinary(x, keep, self.max_norm_ratio) if self.max_norm_ratio else keep


def _with_grafts(
    bare: Evaluation,
    model: nn.Module,
    coders: Mapping[str, SparseCoder],
    hooks: Mapping[str, str],
    source: OnTheFly,
    batches: int,
    left_out: _LeftOut,
    means: Mapping[str, Tensor],
    progress: Stages,
) -> Evaluation:
    plans: dict[tuple[str, str], dict[str, Replacement]] = {}
    for name, hook in hooks.items():
        plans["grafted", name] = {hook: _replacement(hook, coders[name])}
        plans["zero", name] = {hook: lambda x, y: torch.zeros_like(y)}
        plans["mean", name] = {hook: lambda x, y, mean=means[hook]: mean.to(y.dtype).expand_as(y)}
    # The first coder of each hookpoint stands for it.
    first = {hook: coders[name] for name, hook in reversed(list(hooks.items()))}
    plans["together", ""] = {hook: _replacement(hook, coder) for hook, coder in first.items()}
    transcoded = {key: coders[key[1]].cfg.transcode for key in plans if key[1]}
    totals = {key: torch.zeros(3, dtype=torch.float64) for key in plans}
    clean_ce, count = 0.0, 0
    for index in range(batches):
        tokens = source.tokens(index)
        clean = logits_of(_hooks.call(model, tokens))
        clean_ce += float(compare(clean, clean, tokens)[0])
        count += tokens[:, 1:].numel()
        for key, replacements in plans.items():
            spared = {
                hook: _sparing(left_out, tokens, transcoded.get(key, first[hook].cfg.transcode), replacement)
                for hook, replacement in replacements.items()
            }
            with _hooks.spliced(model, spared):
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
        out = self.coder.skipped(out, x)
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
        seconds.append((_now(tokens) - began) / (len(tokens) if tokens.is_floating_point() else tokens.numel()))
    return 1e6 * median(seconds)


def _now(like: Tensor) -> float:
    """The time once everything asked of the tensor's device is done."""
    if like.device.type != "cpu":
        torch.accelerator.synchronize(like.device)
    return time.perf_counter()


def _replacement(hook: str, coder: SparseCoder) -> Replacement:
    def replace(x: Tensor | None, y: Tensor) -> Tensor:
        if coder.cfg.transcode and x is None:
            raise HookpointError(f"{hook} is called with token ids, so a transcoder has no input to read there")
        return coder.reconstruct(x if coder.cfg.transcode and x is not None else y)

    return replace


def _sparing(left_out: _LeftOut, tokens: Tensor, transcoded: bool, replacement: Replacement) -> Replacement:
    def replace(x: Tensor | None, y: Tensor) -> Tensor:
        keep = left_out.keep(tokens, x if transcoded and x is not None else y)
        new = replacement(x, y).to(y.dtype)
        return new if keep is None else torch.where(keep[..., None], new, y)

    return replace


def _has_logits(model: nn.Module, tokens: Tensor) -> bool:
    if tokens.is_floating_point():
        return False
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
