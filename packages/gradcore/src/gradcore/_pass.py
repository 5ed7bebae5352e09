"""One forward and backward over a batch: the rows that come of it, side by side."""

from __future__ import annotations

from torch import Tensor

from gradcore._errors import CaptureError
from gradcore._plan import CapturePlan


class Pass:
    """One forward and backward over a batch: its rows, and which modules have written theirs."""

    def __init__(self, plan: CapturePlan, spare: Tensor | None, examples: int) -> None:
        self.plan = plan
        self.examples = examples
        self.touched: set[str] = set()
        self.rows: Tensor | None = None
        self._spare = spare

    def add(self, name: str, gradient: Tensor) -> None:
        flat = gradient.flatten(1)
        if self.rows is None:
            self.rows = self._allocate(flat)
        if len(flat) != len(self.rows):
            raise CaptureError(
                f"{name} saw {len(flat)} examples, modules before it {len(self.rows)}: "
                "the first dimension of every captured input must be the example"
            )
        column = self.plan.column_of(name)
        part = self.rows[:, self.plan.slices[column]]
        if column in self.touched:
            part += flat
        else:
            part.copy_(flat)
            self.touched.add(column)

    def finish(self) -> Tensor:
        """The rows, with zeros where no gradient arrived."""
        if self.rows is None:
            raise CaptureError("a closure took the gradients: there are no rows to hand out")
        for name, columns in self.plan.slices.items():
            if name not in self.touched:
                self.rows[:, columns].zero_()
        return self.rows

    def _allocate(self, like: Tensor) -> Tensor:
        spare, examples = self._spare, len(like)
        self._spare = None
        fits = spare is not None and spare.dtype == like.dtype and spare.device == like.device
        if spare is not None and fits and len(spare) >= examples:
            return spare[:examples]
        return like.new_empty(examples, self.plan.width)
