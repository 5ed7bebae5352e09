"""Schedules: a value for every step of training, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from probing._errors import ConfigError


class Schedule(Protocol):
    """A number for each step: ``schedule(step, steps)``, step counted from 0."""

    def __call__(self, step: int, steps: int) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The same value throughout."""

    value: float

    def __call__(self, step: int, steps: int) -> float:
        """``value``."""
        return self.value


@dataclass(frozen=True)
class Geometric:
    """From ``start`` to ``end``, multiplying: the temperature of continuous sparsification, β_max^(t/T).

    >>> [round(Geometric(1, 200)(step, 3), 3) for step in range(4)]
    [1.0, 5.848, 34.2, 200.0]

    Args:
        start: value at step 0.
        end: value at the last step.
        jumps: in so many equal jumps instead of every step; the papers anneal once an epoch.
    """

    start: float = 1.0
    end: float = 200.0
    jumps: int | None = None

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.end > 0):
            raise ConfigError(f"a geometric schedule needs positive ends, found {self.start} and {self.end}")

    def __call__(self, step: int, steps: int) -> float:
        """The value at this step."""
        done = step / max(1, steps)
        if self.jumps:
            done = int(done * self.jumps + 1e-9) / self.jumps
        return self.start * (self.end / self.start) ** done


@dataclass(frozen=True)
class PerStep:
    """``start · factor^step``: ×1.001 per step is what users of language models prefer (Chang & Bergen 2025)."""

    factor: float = 1.001
    start: float = 1.0

    def __call__(self, step: int, steps: int) -> float:
        """The value at this step."""
        return self.start * self.factor**step


@dataclass(frozen=True)
class Ramp:
    """Zero, then linear, then ``value``: Cao et al.'s λ, flat for a quarter, rising for half, flat again.

    >>> [Ramp(1.0)(step, 8) for step in (0, 2, 4, 6, 8)]
    [0.0, 0.0, 0.5, 1.0, 1.0]
    """

    value: float = 1.0
    begin: float = 0.25
    end: float = 0.75

    def __call__(self, step: int, steps: int) -> float:
        """The value at this step."""
        done = step / max(1, steps)
        return self.value * min(1.0, max(0.0, (done - self.begin) / (self.end - self.begin)))
