"""What a person can set of a method, how each is typed, and which methods have a use for it."""

from __future__ import annotations

from collections.abc import Mapping

from attribute._errors import AttributionError
from attribute.methods._estimator import Estimator, estimators

OPTIONS = {
    "modules": "--modules",
    "exclude": "--exclude",
    "include_bias": "--include-bias",
    "split_attention_modules": "--split-attention-modules",
    "loss_reduction": "--loss-reduction",
    "rewards": "--data.reward-column",
    "projection_dim": "--projection-dim",
    "projection_type": "--projection-type",
    "projection_seed": "--projection-seed",
    "normalizer": "--normalizer",
    "moments": "--optimizer-state-path",
    "checkpoints": "--checkpoint",
    "horizon": "--horizon",
    "batch": "--train-batch-size",
    "damping": "--damping",
    "labels": "--use-dataset-labels",
    "seed": "--seed",
    "solver_rows": "--solver-rows",
    "solver_steps": "--solver-steps",
    "group_column": "--query.group-column",
    "nearest": "--nearest",
}
"""Setting → its option in ``trace method``."""


def require_used(estimator: Estimator, given: Mapping[str, str]) -> None:
    """Raise unless the method has a use for every setting that was given.

    Args:
        estimator: the method.
        given: setting → how it was typed.

    Raises:
        AttributionError: one would do nothing; names the methods that it is for.
    """
    for name, option in given.items():
        if name not in estimator.uses:
            others = ", ".join(each.name for each in estimators().values() if name in each.uses)
            raise AttributionError(f"{option} does nothing for {estimator.name}: leave it away (it is for {others})")
