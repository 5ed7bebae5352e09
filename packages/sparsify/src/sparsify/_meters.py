"""Sums over a logging interval, and over the time since the last checkpoint."""

from __future__ import annotations

import math

from torch import Tensor

from sparsify._parallel import Processes


class Meters:
    """Adds up what each step measures; ``kind/coder`` names a measurement, ``steps`` counts.

    Sums stay on their device until an average is asked for: reading one waits for the device.
    """

    def __init__(self) -> None:
        self.interval: dict[str, Tensor] = {}
        self._since_save: dict[str, Tensor] = {}

    def add(self, key: str, value: Tensor) -> None:
        """One more term."""
        value = value.double() if value.device.type != "mps" else value.float()
        self.interval[key] = self.interval[key] + value if key in self.interval else value
        if key.startswith("fvu/") or key in ("steps", "ce", "kl"):
            self._since_save[key] = self._since_save[key] + value if key in self._since_save else value

    def averages(self, processes: Processes | None) -> dict[str, float]:
        """Means over the interval, which ends here; ``l0`` is per token, ``tokens`` stays a sum.

        Args:
            processes: those whose sums are to be added to ours, where each saw its own share of the data.
        """
        sums = {key: value.clone() for key, value in self.interval.items()}
        self.interval.clear()
        if processes is not None:
            # Steps and tokens are counted over all processes already.
            processes.sum_(*(v for key, v in sums.items() if key != "steps" and not key.startswith("tokens/")))
        steps = float(sums.pop("steps"))
        averages: dict[str, float] = {}
        for key, value in sums.items():
            kind, _, name = key.partition("/")
            if kind == "l0_sum":
                averages[f"l0/{name}"] = float(value) / max(float(sums[f"tokens/{name}"]), 1.0)
            else:
                averages[key] = float(value) if kind == "tokens" else float(value) / steps
        return averages

    def mean_since_save(self, key: str, processes: Processes | None) -> float:
        """Mean per step since the last checkpoint, over all processes; infinity where nothing was measured."""
        if key not in self._since_save:
            return math.inf
        total = self._since_save[key].clone()
        if processes is not None:
            processes.sum_(total)
        return float(total / self._since_save["steps"])

    def saved(self) -> None:
        """A checkpoint was written."""
        self._since_save.clear()
