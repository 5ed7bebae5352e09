"""Methods that work from a model and its data (a :class:`Study`) rather than from a store, and the table of those."""

from __future__ import annotations

from abc import ABC, abstractmethod
from difflib import get_close_matches
from typing import ClassVar

import numpy as np

from attribute._errors import AttributionError
from attribute.methods._study import Study

NOTHING = frozenset[str]()
GRADIENTS = frozenset({"modules", "exclude", "include_bias", "split_attention_modules", "loss_reduction", "rewards"})
"""Settings of every method that works from gradients."""
SKETCH = frozenset({"projection_dim", "projection_type", "projection_seed"})
"""Of those that sketch them."""
FISHER = frozenset({"labels", "seed"})
"""Of those that fit Kronecker factors."""


class Estimator(ABC):
    """Scores of training rows for queries; positive means that training on the row lowers the query's loss.

    Attributes:
        name: as it is asked for.
        needs: what beyond model, rows and queries it works from.
        uses: the settings that can change its scores, of :data:`attribute.methods.OPTIONS`; others are refused.
        normalizer: the one it takes where none is asked for.
        cost: in passes over the training rows.
        source: paper and equation.
    """

    name: ClassVar[str]
    needs: ClassVar[str] = "nothing more"
    uses: ClassVar[frozenset[str]] = GRADIENTS
    normalizer: ClassVar[str] = ""
    cost: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def influence(self, study: Study) -> np.ndarray:
        """All scores ``[queries, rows]``, float32."""


_ESTIMATORS: dict[str, Estimator] = {}


def register_estimator(cls: type[Estimator]) -> type[Estimator]:
    """Class decorator: make an estimator available by its name."""
    _ESTIMATORS[cls.name] = cls()
    return cls


def estimator_named(name: str) -> Estimator:
    """The estimator of that name; :class:`AttributionError` lists close matches."""
    if name not in _ESTIMATORS:
        close = get_close_matches(name, _ESTIMATORS) or sorted(_ESTIMATORS)
        raise AttributionError(f"no method {name!r}; did you mean {', '.join(close)}?")
    return _ESTIMATORS[name]


def estimators() -> dict[str, Estimator]:
    """All of them by name."""
    return dict(sorted(_ESTIMATORS.items()))
