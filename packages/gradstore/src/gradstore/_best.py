"""The k best rows of a sweep, from scores that are right only to within known errors.

Rows that could still be among the best are kept with what is known of their scores, and are scored exactly at the end,
or when too many pile up: near-equal rows, such as copies of one document, can't be told apart otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Exact = Callable[[I64, I64], F32]  # numbers of queries [p] and of rows [p] → exact scores [p]


class Best:
    """The k largest scores per query, with their rows; blocks come in row order, and of equal scores the first wins.

    After `finish`, `rows` and `scores` are [q, min(k, rows seen)], from the largest down.
    """

    def __init__(self, queries: int, k: int, exact: Exact) -> None:
        self._k, self._exact = k, exact
        self._limit = 2 * k + 256
        self._seen = 0
        self._rows = [np.empty(0, np.int64) for _ in range(queries)]
        self._low = [np.empty(0, np.float32) for _ in range(queries)]  # the score is at least this
        self._high = [np.empty(0, np.float32) for _ in range(queries)]  # and at most this
        self._bar = np.full(queries, -np.inf, np.float32)  # what a row must reach to be kept
        self.rows: I64 = np.empty((queries, 0), np.int64)
        self.scores: F32 = np.empty((queries, 0), np.float32)

    def add(self, start: int, scores: F32, errors: F32) -> None:
        """Take in the next block: scores [q, n], right to within `errors`."""
        self._seen += scores.shape[1]
        if not self._k:
            return
        high = scores + errors
        touched = np.flatnonzero(high.max(axis=1, initial=-np.inf) >= self._bar)
        for query in touched.tolist():
            near = np.flatnonzero(high[query] >= self._bar[query])
            low = scores[query, near] - errors[query, near]
            self._rows[query] = np.concatenate([self._rows[query], start + near])
            self._low[query] = np.concatenate([self._low[query], low])
            self._high[query] = np.concatenate([self._high[query], high[query, near]])
            if len(self._rows[query]) > self._k:
                self._prune(query)
            if len(self._rows[query]) > self._limit:
                self._resolve([query])

    def finish(self) -> None:
        """Score exactly what is left."""
        found = min(self._k, self._seen)
        self._resolve(range(len(self._rows)))
        self.rows = np.stack(self._rows) if self._rows else np.empty((0, found), np.int64)
        self.scores = np.stack(self._low) if self._low else np.empty((0, found), np.float32)

    def rank_again(self, k: int, exact: Exact) -> None:
        """After `finish`: keep the k best by another score."""
        queries = np.repeat(np.arange(len(self.rows)), self.rows.shape[1])
        scores = exact(queries, self.rows.reshape(-1)).reshape(self.rows.shape)
        order = np.lexsort((self.rows, -scores))[:, :k]
        self.rows = np.take_along_axis(self.rows, order, 1)
        self.scores = np.take_along_axis(scores, order, 1)

    def _prune(self, query: int) -> None:
        """Let go of rows that k others beat for sure."""
        low = self._low[query]
        bar = np.partition(low, len(low) - self._k)[len(low) - self._k]
        self._bar[query] = max(self._bar[query], bar)
        self._keep(query, np.flatnonzero(self._high[query] >= bar))

    def _resolve(self, queries: Sequence[int]) -> None:
        """Make the scores of what these queries keep exact, and keep the k best."""
        unsure = [np.flatnonzero(self._low[query] != self._high[query]) for query in queries]
        rows = np.concatenate([np.empty(0, np.int64), *(self._rows[q][u] for q, u in zip(queries, unsure))])
        if len(rows):
            counts = [len(places) for places in unsure]
            scores = self._exact(np.repeat(np.asarray(queries), counts), rows)
            for query, places, part in zip(queries, unsure, np.split(scores, np.cumsum(counts)[:-1])):
                self._low[query][places] = part
        for query in queries:
            self._high[query] = self._low[query]
            self._keep(query, np.lexsort((self._rows[query], -self._low[query]))[: self._k])
            if 0 < self._k == len(self._rows[query]):  # a later row must be strictly better
                self._bar[query] = np.nextafter(self._low[query][-1], np.float32(np.inf))

    def _keep(self, query: int, places: I64) -> None:
        self._rows[query] = self._rows[query][places]
        self._low[query], self._high[query] = self._low[query][places], self._high[query][places]
