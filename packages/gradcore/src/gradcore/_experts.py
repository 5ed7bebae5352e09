"""Watching the experts of a mixture: their eager forward pass runs as it is, and every product with an expert's matrix
is seen together with the tokens that went into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradcore._errors import CaptureError
from gradcore.layers.experts import matrices

_PRODUCTS = ("linear", "matmul", "__matmul__", "mm")

OnProduct = Callable[[str, int, Tensor, Tensor, Tensor], Tensor]
"""Parameter, expert, tokens ``[t]``, input ``[t, in]``, output ``[t, out]`` → the output to go on with."""


def watch(module: nn.Module, on_product: OnProduct) -> Callable[[], None]:
    """Let the module's forward pass report its products; the returned function undoes it.

    The pass is the class's own eager one, expert by expert, whatever implementation the model runs otherwise: the same
    function of the same weights.
    """
    eager = getattr(type(module).forward, "__wrapped__", type(module).forward)
    before = vars(module).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else next(iter(kwargs.values()))
        with _Watching(matrices(module), hidden, on_product):
            return eager(module, *args, **kwargs)

    module.forward = forward

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return undo


class _Watching(TorchFunctionMode):
    def __init__(self, parameters: Mapping[str, nn.Parameter], hidden: Tensor, on_product: OnProduct) -> None:
        super().__init__()
        self._parameters = {id(each): name for name, each in parameters.items()}
        self._hidden, self._on_product = hidden, on_product
        self._slices: dict[int, tuple[Tensor, str, int]] = {}  # the slice is held, so that its id stays its own
        self._tokens: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__getitem__" and id(args[0]) in self._parameters:
            self._slices[id(found)] = (found, self._parameters[id(args[0])], int(args[1]))
        elif name == "__getitem__" and args[0] is self._hidden:
            self._tokens = args[1]
        elif len(args) > 1 and id(args[1]) in self._slices:
            _, parameter, expert = self._slices[id(args[1])]
            if name not in _PRODUCTS or self._tokens is None or len(args[0]) != len(self._tokens):
                raise CaptureError(
                    f"the experts' {parameter} meets {name}, which is not the product of some tokens with one expert's "
                    "matrix: this kind of mixture is not captured (--exclude its experts)"
                )
            return self._on_product(parameter, expert, self._tokens, args[0], found)
        return found


@dataclass(frozen=True)
class Grouped:
    """The tokens of an expert by example: row i of the products is token ``place`` of example ``example``."""

    example: Tensor
    place: Tensor
    examples: int
    width: int

    @classmethod
    def of(cls, tokens: Tensor, examples: int, positions: int, *, all_positions: bool) -> Grouped:
        """From flat token numbers; with all positions each token keeps its own, else they are packed to the left."""
        example = tokens // positions
        if all_positions:
            return cls(example, tokens % positions, examples, positions)
        order = torch.argsort(example, stable=True)
        counts = torch.bincount(example, minlength=examples)
        starts = counts.cumsum(0) - counts
        place = torch.empty_like(example)
        place[order] = torch.arange(len(example), device=tokens.device) - starts[example[order]]
        return cls(example, place, examples, int(counts.max()))

    def spread(self, rows: Tensor) -> Tensor:
        """``[t, d]`` to ``[examples, width, d]``, zero where there is no token."""
        found = rows.new_zeros(self.examples, self.width, rows.shape[1])
        return found.index_put_((self.example, self.place), rows)
