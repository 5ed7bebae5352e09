"""Whether an input that is kept between forward and backward is still what it was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Watch:
    """A tensor that nobody may change in place until the backward pass.

    Torch counts writes, which tells at once. LLM.int8 writes, too: it sets outliers of its input to zero and puts them
    back (bitsandbytes, ``int8_vectorwise_quant``). Where a model has such layers the sums of the rows and columns of
    the tensor's bits are remembered, and a tensor that was written counts as changed only if they differ.

    >>> given = torch.ones(2, 3)
    >>> plain, lenient = Watch.over(given), Watch.over(given, may_be_restored=True)
    >>> _ = given.mul_(2).div_(2)
    >>> plain.changed(), lenient.changed()
    (True, False)

    Attributes:
        tensor: what is watched.
        version: how often it had been written.
        sums: of its bits, or ``None`` where every write is a change.
    """

    tensor: Tensor
    version: int
    sums: tuple[Tensor, Tensor] | None = None

    @classmethod
    def over(cls, tensor: Tensor, *, may_be_restored: bool = False) -> Watch:
        """Begin to watch."""
        return cls(tensor, tensor._version, _sums(tensor) if may_be_restored else None)

    def changed(self) -> bool:
        """Whether it holds something else than it did."""
        if self.tensor._version == self.version:
            return False
        return self.sums is None or any(not torch.equal(*pair) for pair in zip(self.sums, _sums(self.tensor)))


def is_quantised(module: nn.Module) -> bool:
    """Whether a module's weight is stored as whole numbers, as those of 8 and 4 bits are."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_floating_point() and not weight.is_complex()


def _sums(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Exact, as whole numbers are added: two tensors of equal sums differ in four entries at least."""
    bits = tensor.view(_BITS[tensor.element_size()]).flatten(0, -2)
    return bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64)
