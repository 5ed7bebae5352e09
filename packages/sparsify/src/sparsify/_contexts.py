"""What makes a latent fire: the tokens where it is most active, with the text around them.

Two passes over the rows. The first keeps, latent by latent, the strongest places met so far, at most one of a row; the
second runs only the rows that were kept and reads the latent's activation at every token of each window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import _hooks
from sparsify._coder import SparseCoder
from sparsify._errors import ConfigError, DataError
from sparsify._evaluate import coders_source, evaluating
from sparsify._progress import Stages, silent
from sparsify._source import OnTheFly, Pair, check_finite, limited, warn_of_end


@dataclass(frozen=True)
class Context:
    """A window of tokens around a place where a latent fires.

    Attributes:
        row, position: where the strongest token stands in the dataset.
        tokens: ids of the window.
        acts: the latent's activation at each of them.
    """

    row: int
    position: int
    tokens: tuple[int, ...]
    acts: tuple[float, ...]

    @property
    def peak(self) -> float:
        """The strongest activation."""
        return max(self.acts)


@dataclass(frozen=True)
class Latent:
    """One latent of one coder: how often it fires, where most, and which next tokens its direction favours.

    Attributes:
        index: its number.
        frequency: share of tokens at which it fires.
        contexts: the strongest first, one a row.
        promoted, suppressed: token ids by the logits that the decoder row alone would add, largest and smallest first;
            empty where the coder does not write the residual stream that the model's head reads.
    """

    index: int
    frequency: float
    contexts: tuple[Context, ...]
    promoted: tuple[int, ...] = ()
    suppressed: tuple[int, ...] = ()


def top_contexts(
    model: nn.Module,
    coders: Mapping[str, SparseCoder],
    dataset: Any,
    *,
    latents: Sequence[int] | None = None,
    sample: int = 24,
    contexts: int = 6,
    before: int = 24,
    after: int = 8,
    batch_size: int = 8,
    max_batches: int | None = None,
    seed: int = 0,
    progress: Stages = silent,
) -> dict[str, list[Latent]]:
    """The latents of each coder with their strongest contexts.

    >>> found = top_contexts(model, {"layers.3": sae}, tokenized, latents=[17])  # doctest: +SKIP
    >>> tokenizer.decode(found["layers.3"][0].contexts[0].tokens)  # doctest: +SKIP

    Args:
        model, coders, dataset, batch_size, max_batches, progress: as for `evaluate`.
        latents: which; by default ``sample`` of those that fired, drawn with ``seed`` and sorted by frequency.
        contexts: windows a latent.
        before, after: tokens of the window on either side of the strongest.

    Raises:
        ConfigError: a latent that a coder does not have.
        DataError: no rows, or no latent fires on them.
    """
    hooks = {name: _hooks.hook_of(name) for name in coders}
    for name, coder in coders.items():
        for latent in latents or ():
            if not 0 <= latent < coder.num_latents:
                raise ConfigError(f"{name} has latents 0 to {coder.num_latents - 1}, not {latent}")
    source = coders_source(model, coders, dataset, batch_size)
    if source.tokens(0).is_floating_point():
        raise DataError("the rows are not token ids, so there are no contexts to show")
    batches = limited(len(source), max_batches)
    with torch.no_grad(), _hooks.frozen(model), evaluating(coders):
        best = {name: _Best(coder, contexts) for name, coder in coders.items()}
        for index in range(batches):
            if not source.reaches(index):
                warn_of_end(source, "so the contexts are of these")
                break
            length, batch = source.tokens(index).shape[1], source.batch(index)
            for name, hook in hooks.items():
                acts, indices = _code(coders[name], check_finite(batch[hook], hook, index))
                best[name].add(acts, indices, index * batch_size, length)
            progress("searching contexts", index + 1, batches)
        found: dict[str, list[Latent]] = {}
        for name, coder in coders.items():
            chosen = best[name].chosen(latents, sample, seed)
            if not chosen:
                raise DataError(f"{name}: no latent fires on {best[name].tokens:,} tokens, so there is nothing to show")
            windows = _windows(source, hooks[name], coder, best[name], chosen, before, after)
            tokens = _favoured(model, coder, chosen)
            found[name] = [
                Latent(latent, best[name].frequency(latent), windows[latent], *tokens.get(latent, ((), ())))
                for latent in chosen
            ]
    return found


class _Best:
    """The strongest places of every latent so far: values (M, n), with row and position."""

    def __init__(self, coder: SparseCoder, contexts: int) -> None:
        shape = (coder.num_latents, contexts)
        self.values = torch.zeros(shape, device=coder.device)
        self.places = torch.full((*shape, 2), -1, dtype=torch.long, device=coder.device)
        self.fired = torch.zeros(coder.num_latents, dtype=torch.long, device=coder.device)
        self.tokens = 0

    def add(self, acts: Tensor, indices: Tensor, first_row: int, length: int) -> None:
        """A batch's code, (tokens, K) each, whose rows have ``length`` tokens and begin at ``first_row``."""
        self.tokens += len(acts)
        token = torch.arange(len(acts), device=acts.device)[:, None].expand_as(indices)
        active = acts > 0
        value, latent, token = acts[active].float(), indices[active], token[active]
        self.fired.scatter_add_(0, latent, torch.ones_like(latent))
        row, position = first_row + token // length, token % length
        # Strongest first, then grouped by (latent, row): the first of each group is the row's strongest.
        order = value.argsort(descending=True, stable=True)
        group = (latent * (len(acts) // length) + token // length)[order]
        order = order[group.argsort(stable=True)]
        group = group.sort().values
        order = order[torch.ones_like(group, dtype=torch.bool).index_put_((_repeats(group),), torch.tensor(False))]
        # Again strongest first, then by latent: the place within a latent is its rank.
        order = order[value[order].argsort(descending=True, stable=True)]
        order = order[latent[order].argsort(stable=True)]
        rank = torch.arange(len(order), device=order.device) - torch.searchsorted(latent[order], latent[order])
        order, rank = order[rank < self.values.shape[1]], rank[rank < self.values.shape[1]]
        values, places = torch.zeros_like(self.values), torch.full_like(self.places, -1)
        values[latent[order], rank] = value[order]
        places[latent[order], rank] = torch.stack((row[order], position[order]), dim=-1)
        both, where = torch.cat((self.values, values), 1), torch.cat((self.places, places), 1)
        self.values, kept = both.topk(self.values.shape[1], dim=1)
        self.places = where.gather(1, kept[..., None].expand(-1, -1, 2))

    def chosen(self, latents: Sequence[int] | None, sample: int, seed: int) -> list[int]:
        """The latents asked for, or a sample of those that fired; the most frequent first."""
        if latents is None:
            alive = self.fired.cpu().nonzero().squeeze(1)
            order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))[:sample]
            latents = alive[order].tolist()
        fired = self.fired.tolist()
        return sorted(dict.fromkeys(latents), key=lambda latent: -fired[latent])

    def frequency(self, latent: int) -> float:
        """Share of tokens at which it fired."""
        return float(self.fired[latent]) / self.tokens


def _repeats(group: Tensor) -> Tensor:
    """Places in a sorted vector that hold what the place before them holds."""
    return (group[1:] == group[:-1]).nonzero().squeeze(1) + 1


def _code(coder: SparseCoder, pair: Pair) -> tuple[Tensor, Tensor]:
    acts, indices, _ = coder.encode((pair.x if coder.cfg.transcode else pair.y).float())
    return acts, indices


def _windows(
    source: OnTheFly, hook: str, coder: SparseCoder, best: _Best, chosen: Sequence[int], before: int, after: int
) -> dict[int, tuple[Context, ...]]:
    places = {latent: [tuple(place) for place in best.places[latent].tolist() if place[0] >= 0] for latent in chosen}
    wanted: dict[int, list[tuple[int, int, int]]] = {}
    for latent, found in places.items():
        for row, position in found:
            wanted.setdefault(row // source.batch_size, []).append((latent, row, position))
    windows: dict[tuple[int, int], Context] = {}
    for index, members in sorted(wanted.items()):  # a stream is read forwards
        tokens = source.tokens(index)
        acts, indices = _code(coder, source.batch(index)[hook])
        for latent, row, position in members:
            inside = row - index * source.batch_size
            start, stop = max(0, position - before), min(tokens.shape[1], position + after + 1)
            part = slice(inside * tokens.shape[1] + start, inside * tokens.shape[1] + stop)
            strip = torch.where(indices[part] == latent, acts[part], 0).clamp(min=0).sum(1)
            ids = tokens[inside, start:stop].tolist()
            windows[latent, row] = Context(row, position, tuple(ids), tuple(strip.tolist()))
    return {latent: tuple(windows[latent, row] for row, _ in found) for latent, found in places.items()}


def _favoured(
    model: nn.Module, coder: SparseCoder, chosen: Sequence[int], count: int = 8
) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Token ids whose logits each decoder row raises and lowers most, through the head alone (the logit lens)."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or coder.W_dec is None or head.weight.shape[-1] != coder.d_out:
        return {}
    rows = coder.W_dec[list(chosen)].float()
    logits = rows @ head.weight.to(rows.device).float().T
    top, bottom = logits.topk(count).indices.tolist(), logits.topk(count, largest=False).indices.tolist()
    return {latent: (tuple(up), tuple(down)) for latent, up, down in zip(chosen, top, bottom)}
