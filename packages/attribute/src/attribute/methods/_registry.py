"""What a method over a gradient store must say, and the table of those that have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from difflib import get_close_matches
from typing import ClassVar, Literal

import numpy as np

from attribute._errors import AttributionError
from gradstore import GradientStore, SearchResult


class Method(ABC):
    """Scores of stored rows for query gradients; positive means that training on the row lowers the query's loss."""

    name: ClassVar[str]

    @abstractmethod
    def search(
        self, store: GradientStore, queries: np.ndarray, k: int, modules: Sequence[str] | None = None
    ) -> SearchResult:
        """Top and bottom ``k`` rows for query gradients ``[q, width]``."""

    @abstractmethod
    def scores(self, store: GradientStore, queries: np.ndarray, modules: Sequence[str] | None = None) -> np.ndarray:
        """All scores ``[q, rows]``."""


_METHODS: dict[str, Method] = {}


def register_method(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method available by its name."""
    _METHODS[cls.name] = cls()
    return cls


def method_named(name: str) -> Method:
    """The method of that name; :class:`AttributionError` lists close matches."""
    if name not in _METHODS:
        close = get_close_matches(name, _METHODS) or sorted(_METHODS)
        raise AttributionError(f"no method {name!r}; did you mean {', '.join(close)}?")
    return _METHODS[name]


class InnerProduct(Method):
    """Methods that are one sweep over the store with a metric."""

    metric: ClassVar[Literal["dot", "cos"]]

    def search(
        self, store: GradientStore, queries: np.ndarray, k: int, modules: Sequence[str] | None = None
    ) -> SearchResult:
        """One sweep, both ends."""
        from gradstore import search

        return search(store, queries, k, metric=self.metric, modules=modules)

    def scores(self, store: GradientStore, queries: np.ndarray, modules: Sequence[str] | None = None) -> np.ndarray:
        """One sweep, everything."""
        from gradstore import scores

        return scores(store, queries, metric=self.metric, modules=modules)
