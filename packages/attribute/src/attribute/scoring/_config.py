"""What a person chooses about scores and reductions, as frozen values that are saved with the result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from attribute._errors import AttributionError
from attribute.curvature._inversion import Inversion

SCORES = ("individual", "mean", "nearest")
TOKENS = ("", "gradient", "output")
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class ReduceConfig:
    """How the gradients of a dataset become one query, or one a group.

    >>> ReduceConfig("sum", unit_normalize=True).method
    'sum'

    Attributes:
        method: ``mean`` or ``sum`` over the rows (of a group) that have a loss.
        unit_normalize: scale every row's gradient to unit length first, over all modules together.
        group_column: a column of the dataset: one reduced gradient for each of its values.
    """

    method: str = "mean"
    unit_normalize: bool = False
    group_column: str = ""

    def __post_init__(self) -> None:
        _one_of("--method", self.method, REDUCTIONS)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)


@dataclass(frozen=True)
class ScoreConfig:
    """How a dataset is scored against queries.

    >>> ScoreConfig("runs/queries", score="nearest").score
    'nearest'

    Attributes:
        query_path: a folder of query gradients: of ``trace reduce``, or an index whose rows are the queries.
        score: ``individual`` (a column a query), ``mean`` over the queries, or ``nearest``, the largest over the
            queries (LESS, Xia et al. 2024, section 4.2, takes it over sub-tasks).
        unit_normalize: compare unit gradients: every individual score is a cosine, and mean and nearest are of cosines.
        modules: patterns of the modules that count; all that the queries have by default.
        curvature_path: a folder of ``trace preconditioners`` or ``trace hessian``: the queries are multiplied with the
            inverse of that curvature first, so that scores are influences.
        inversion: how it is inverted.
        query_rank: keep so many singular directions of each query's matrices (Grosse et al. 2023, section 3.2.2); 0
            keeps the queries exact.
        tokens: a score a token instead of one a row. ``gradient``: what the token's position contributed to the row's
            gradient; ``output``: the gradient of that token's own loss (Grosse et al. 2023, section 5.3). Either sums
            to the row's score.
        query_rows: queries in memory at a time; 0 takes as many as fit.
        top_k: rows at either end in the answer.
    """

    query_path: str = ""
    score: str = "individual"
    unit_normalize: bool = False
    modules: tuple[str, ...] = ()
    curvature_path: str = ""
    inversion: Inversion = field(default_factory=Inversion)
    query_rank: int = 0
    tokens: str = ""
    query_rows: int = 0
    top_k: int = 5

    def __post_init__(self) -> None:
        _one_of("--score", self.score, SCORES)
        _one_of("--attribute-tokens", self.tokens, TOKENS)
        if not self.query_path:
            raise AttributionError("--query-path is missing: a folder of trace reduce or trace build")
        for option, value, least in (("query-rank", self.query_rank, 0), ("top-k", self.top_k, 1)):
            if value < least:
                raise AttributionError(f"--{option} must be at least {least}, not {value}")
        if self.tokens and self.unit_normalize:
            raise AttributionError(
                "the scores of tokens sum to that of their row, cosines do not: leave --unit-normalize away (reduce "
                "has one for the queries)"
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {**asdict(self), "modules": list(self.modules)}


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise AttributionError(f"{option} must be one of {', '.join(filter(None, allowed))}, not {value!r}")
