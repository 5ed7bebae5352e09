"""Global sketch: one vector for the whole model, the sum of its modules' tensor sketches.

Each module has hashes of its own, so the sum is a count sketch of all gradients laid end to end: unbiased for the inner
product over all parameters, in as many floats as a single module has elsewhere. What is lost is the view by module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradcore._errors import GradCoreError
from gradcore.sketches._protocol import BoundSketch, Sketch, register_sketch
from gradcore.sketches.tensor import bound_tensor_sketch


@register_sketch
@dataclass(frozen=True)
class GlobalSketch(Sketch):
    """``floats`` for all modules together; columns and gradients stand under the one name ``"global"``.

    >>> GlobalSketch(floats=4096).shape(4096, 1024)
    (4096,)

    Args:
        floats: places for the whole model.
        seed: another seed is another sketch.
    """

    floats: int = 4096
    seed: int = 0
    kind: ClassVar[str] = "global"
    summed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.floats < 2:
            raise GradCoreError(f"a global sketch keeps at least 2 floats, not {self.floats}")

    def shape(
        self, out_features: int, in_features: int, elementwise: bool = False, *, name: str = ""
    ) -> tuple[int, ...]:
        """``(floats,)``, also for modules that have fewer: their entries must not meet those of others unsigned."""
        return (self.floats,)

    def bind(
        self, name: str, out_features: int, in_features: int, device: torch.device, elementwise: bool = False
    ) -> BoundSketch:
        """A tensor sketch under the module's own hashes."""
        return bound_tensor_sketch(
            (name, "global"), out_features, in_features, self.floats, self.seed, device, elementwise
        )
