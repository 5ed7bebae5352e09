"""Putting vectors back into a model: at one readout, at the probed positions, for one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from probing._errors import DataError, ReadoutError
from probing._readout import Readout
from probing._structure import BlockLayout, find_layout
from probing._tensors import first_tensor, hidden_states, replace_first_tensor, with_hidden


@contextmanager
def patched(
    model: nn.Module,
    readout: Readout | str,
    token_mask: Tensor,
    change: Tensor | Callable[[Tensor], Tensor],
    *,
    layout: BlockLayout | None = None,
) -> Iterator[nn.Module]:
    """The model with the readout's vectors at the probed positions exchanged.

    >>> with patched(model, "mlp_stream_0", last, eraser) as changed:  # doctest: +SKIP
    ...     changed(input_ids=ids)

    Args:
        model: any transformer.
        readout: an update, or ``resid_in``, ``resid_out`` / ``mlp_stream``. ``resid_mid`` / ``attn_stream`` has a
            module of its own in post-norm blocks only; elsewhere change ``attn_update``, which reaches the MLP in the
            same way.
        token_mask: boolean [rows, positions], for the batch the model is called with.
        change: [R, d] new vectors in row order, or a function of the old ones.
        layout: the block's layout, if it is known already (`find_layout`); else it is found by a trial run.

    Raises:
        ReadoutError: a readout without a place to write to.
        DataError: vectors that do not fit the positions.
    """
    place = Readout.parse(readout) if isinstance(readout, str) else readout
    layout = layout or find_layout(model, [place.layer])[0]

    def exchange(value: Tensor) -> Tensor:
        shaped = value.reshape(*token_mask.shape, value.shape[-1])
        old = shaped[token_mask]
        new = change(old) if callable(change) else change
        if new.shape != old.shape:
            raise DataError(
                f"{place.key!r} has {tuple(old.shape)} vectors at the probed positions, not {tuple(new.shape)}"
            )
        exchanged = shaped.clone()
        exchanged[token_mask] = new.to(shaped.dtype)
        return exchanged.reshape(value.shape)

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        value = first_tensor(output)
        assert value is not None
        return replace_first_tensor(output, exchange(value))

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        value = hidden_states(args, kwargs)
        assert value is not None
        return with_hidden(args, kwargs, exchange(value))

    middle = layout.middle if place.kind in ("resid_mid", "attn_stream") else None
    path = {"attn_update": layout.attn, "mlp_update": layout.mlp, "cross_update": layout.cross,
            "resid_out": layout.path, "mlp_stream": layout.path}.get(place.kind, middle)  # fmt: skip
    if place.kind == "resid_in":
        handle = model.get_submodule(layout.path).register_forward_pre_hook(before, with_kwargs=True)
    elif path is not None:
        handle = model.get_submodule(path).register_forward_hook(after)
    else:
        raise ReadoutError(
            f"{place.key!r} cannot be written to in block {layout.path!r}: no module gives it. Change "
            f"attn_update_{place.layer} instead"
        )
    try:
        yield model
    finally:
        handle.remove()


class Interchange(nn.Module):
    """Distributed interchange intervention with a learnt rotation and boundary (boundless DAS, Wu et al. 2023).

    >>> swap = Interchange(4)
    >>> base, source = torch.randn(3, 4), torch.randn(3, 4)
    >>> with torch.no_grad():
    ...     _ = swap.boundary.fill_(4.0)
    >>> torch.allclose(swap.eval()(base, source), source, atol=1e-5)
    True

    out = Rᵀ[(1 − m)·R base + m·R source], R orthogonal, m the first ``boundary`` coordinates: soft (a sigmoid of width
    ``temperature``) while training, hard after.

    Args:
        width: of the vectors.
        boundary: how many rotated coordinates carry the variable, to start with; half by default.
        fixed: keep that number instead of learning it (plain DAS, Geiger et al. 2023).
        seed: of the initial rotation.
    """

    def __init__(self, width: int, boundary: float | None = None, *, fixed: bool = False, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        start = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        self.start = nn.Buffer(start)
        self.skew = nn.Parameter(torch.zeros(width, width))
        value = torch.tensor(float(width / 2 if boundary is None else boundary))
        self.boundary = nn.Parameter(value, requires_grad=not fixed)
        self.temperature = 5.0

    def rotation(self) -> Tensor:
        """R, orthogonal: the exponential of a skew-symmetric matrix times the random start."""
        return torch.linalg.matrix_exp(self.skew - self.skew.T) @ self.start

    def mask(self) -> Tensor:
        """m, one entry per rotated coordinate."""
        places = torch.arange(len(self.start), device=self.start.device) + 0.5
        distance = self.boundary - places
        return torch.sigmoid(distance / self.temperature) if self.training else (distance > 0).float()

    def forward(self, base: Tensor, source: Tensor) -> Tensor:
        """``base`` with the variable's coordinates taken from ``source``; both [R, d]."""
        rotation, m = self.rotation().to(base.dtype), self.mask().to(base.dtype)
        return base + ((source - base) @ rotation.T * m) @ rotation


def train_interchange(
    model: nn.Module,
    readout: str,
    token_mask: Tensor,
    base: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    expected: Tensor,
    logits: Callable[[Any], Tensor] | None = None,
    *,
    swap: Interchange | None = None,
    epochs: int = 50,
    batch_size: int = 128,
    lr: float = 0.01,
    boundary_lr: float = 0.05,
    boundary_weight: float = 0.0,
    seed: int = 0,
) -> Interchange:
    """Find the subspace of a readout that carries a variable: swapping it must change the answer as the variable would.

    Args:
        model: frozen while it lasts.
        readout: where to intervene, such as ``"attn_update_0"``.
        token_mask: [rows, positions], the same for base and source.
        base: model arguments, one row an example.
        source: arguments of the rows the variable is taken from.
        expected: [rows], the answer if the variable had the source's value.
        logits: from the model's output to class scores [rows, classes]; the last position's by default.
        swap: start from this one.
        epochs: passes over the pairs.
        batch_size: pairs a step.
        lr: of the rotation (Adam).
        boundary_lr: of the boundary.
        boundary_weight: penalty on the share of coordinates used.
        seed: of the order.

    Returns:
        The trained intervention, in eval mode; `interchange_accuracy` scores it.
    """
    take = logits or (lambda output: output.logits[:, -1])
    layout = find_layout(model, [Readout.parse(readout).layer])[0]
    device = token_mask.device
    swap = (swap or Interchange(layout.width, seed=seed)).to(device)
    vectors = _vectors(model, layout, readout, token_mask, source)
    learnt = [p for p in (swap.boundary,) if p.requires_grad]
    groups = [{"params": [swap.skew], "lr": lr}, *([{"params": learnt, "lr": boundary_lr}] if learnt else [])]
    optimiser = torch.optim.Adam(groups)
    steps = epochs * -(-len(expected) // batch_size)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1.0, (s + 1) / (0.1 * steps + 1)) * (1 - s / steps)
    )
    start, done = swap.temperature, 0
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    order = torch.Generator().manual_seed(seed)
    swap.train()
    try:
        for _ in range(epochs):
            for rows in torch.randperm(len(expected), generator=order).to(device).split(batch_size):
                swap.temperature = start * 0.02 ** (done / steps)  # the boundary hardens, 5 → 0.1
                optimiser.zero_grad()
                out = _swapped(model, layout, readout, token_mask[rows], base, vectors[rows], rows, swap)
                loss = nn.functional.cross_entropy(take(out).float(), expected[rows])
                (loss + boundary_weight * swap.boundary / len(swap.start)).backward()
                optimiser.step()
                rate.step()
                done += 1
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return swap.eval()


@torch.no_grad()
def interchange_accuracy(
    model: nn.Module,
    readout: str,
    token_mask: Tensor,
    base: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    expected: Tensor,
    swap: Interchange,
    logits: Callable[[Any], Tensor] | None = None,
) -> Tensor:
    """1 for each pair whose answer after the swap is the expected one; the mean is the interchange accuracy (IIA)."""
    take = logits or (lambda output: output.logits[:, -1])
    layout = find_layout(model, [Readout.parse(readout).layer])[0]
    vectors = _vectors(model, layout, readout, token_mask, source)
    found = []
    for rows in torch.arange(len(expected), device=expected.device).split(512):
        out = _swapped(model, layout, readout, token_mask[rows], base, vectors[rows], rows, swap)
        found.append((take(out).argmax(-1) == expected[rows]).float())
    return torch.cat(found)


@torch.no_grad()
def _vectors(
    model: nn.Module, layout: BlockLayout, readout: str, token_mask: Tensor, inputs: Mapping[str, Tensor]
) -> Tensor:
    """The readout of the rows the variable comes from; one probed position a row."""
    if not bool((token_mask.sum(1) == 1).all()):
        raise DataError("an interchange swaps one position a row; token_mask selects another number")
    seen: list[Tensor] = []

    def remember(old: Tensor) -> Tensor:
        seen.append(old)
        return old

    for rows in torch.arange(len(token_mask), device=token_mask.device).split(512):
        with patched(model, readout, token_mask[rows], remember, layout=layout) as watched:
            watched(**{name: tensor[rows] for name, tensor in inputs.items()})
    return torch.cat(seen)


def _swapped(
    model: nn.Module,
    layout: BlockLayout,
    readout: str,
    token_mask: Tensor,
    base: Mapping[str, Tensor],
    vectors: Tensor,
    rows: Tensor,
    swap: Interchange,
) -> Any:
    with patched(model, readout, token_mask, lambda old: swap(old, vectors), layout=layout) as changed:
        return changed(**{name: tensor[rows] for name, tensor in base.items()})
