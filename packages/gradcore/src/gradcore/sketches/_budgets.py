"""Sketches whose modules need not all keep as many floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from gradcore._errors import GradCoreError
from gradcore.sketches._protocol import Sketch

Budgets = tuple[tuple[str, int], ...]
B = TypeVar("B", bound="Budgeted")


class Budgeted(Sketch):
    """A sketch with ``floats`` a module, and ``budgets`` for modules that have their own.

    Subclasses are dataclasses with both fields.
    """

    floats: int
    budgets: Budgets

    def _read_budgets(self) -> None:
        """Pairs of a saved plan, which are lists, as the tuples of a hashable one."""
        object.__setattr__(self, "budgets", tuple((str(name), int(count)) for name, count in self.budgets))
        for name, count in self.budgets:
            if count < 2:
                raise GradCoreError(f"a {self.kind} sketch keeps at least 2 floats of {name}, not {count}")

    def floats_of(self, name: str) -> int:
        """Of one module: its budget, or ``floats`` where it has none."""
        return dict(self.budgets).get(name, self.floats)

    def with_budgets(self: B, budgets: Mapping[str, int]) -> B:
        """The same sketch with other floats for the modules named."""
        return replace(self, budgets=tuple(budgets.items()))

    def to_dict(self) -> dict[str, Any]:
        """As of any sketch; without budgets it looks as it did before there were any."""
        saved = super().to_dict()
        budgets = [list(each) for each in saved.pop("budgets")]
        return {**saved, "budgets": budgets} if budgets else saved
