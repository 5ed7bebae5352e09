"""Rows meet queries module by module: inner products of whole gradients, of which none exists at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attribute._errors import ModelError
from gradcore import ModuleGradient

QueriesOf = Callable[[str], Sequence[Tensor | ModuleGradient]]
"""A module's queries, ``[q, out, in]`` or factors, in portions."""


class Meeting:
    """Scores of the batch at hand, summed over the modules as their factors come from a collector.

    Args:
        queries_of: the queries by module.
        norms: also sum squared norms, for cosines.
        waits: meet when the batch ends: gradients that a normaliser formed come in blocks of examples. Norms need all
            calls of a module together, so that they wait, too.
        route: how rows meet matrices, instead of what :func:`gradcore.product_costs` finds cheaper for each module.
    """

    def __init__(self, queries_of: QueriesOf, *, norms: bool = False, waits: bool = False, route: str = "") -> None:
        self._queries_of = queries_of
        self._norms = norms
        self._route = route
        self._waits = norms or waits
        self._held: dict[str, list[ModuleGradient]] = {}
        self._scores: Tensor | None = None
        self._squares: Tensor | None = None

    def receive(self, gradient: ModuleGradient) -> None:
        """One module's factors, met at once or when the batch ends."""
        self._held.setdefault(gradient.name, []).append(gradient)
        if not self._waits:
            self._meet(gradient.name)

    def take(self) -> tuple[Tensor, Tensor | None]:
        """Scores ``[n, q]`` and squared norms ``[n]`` of the batch."""
        for name in list(self._held):
            self._meet(name)
        scores, squares = self._scores, self._squares
        self._scores = self._squares = None
        assert scores is not None
        return scores, squares

    def _meet(self, name: str) -> None:
        gradient = ModuleGradient.joined(self._held.pop(name))
        found = []
        for number, query in enumerate(self._queries_of(name)):
            if self._norms and number == 0:
                if isinstance(query, Tensor):
                    dots, squares = gradient.dot_and_sq_norm(query, route=self._route)
                else:
                    dots, squares = gradient.dot(query), gradient.sq_norm()
                self._squares = squares if self._squares is None else self._squares + squares
            else:
                dots = gradient.dot(query, route=self._route)
            found.append(dots)
        scores = torch.cat(found, dim=1)
        if self._scores is not None and len(self._scores) != len(scores):
            raise ModelError(
                f"{name} has {len(scores)} gradients in this batch, modules before it {len(self._scores)}: it does not "
                "see every token of every row (--modules chooses others)"
            )
        self._scores = scores if self._scores is None else self._scores + scores
