"""Attribution methods, one file each, found by name (docs/add-a-method.md, docs/methods.md).

A :class:`Method` asks a store; an :class:`Estimator` works from a model and its data, a :class:`Study`.
"""

from attribute.methods import (
    adam_cg,
    baselines,
    datainf,
    grad_cos,
    grad_dot,
    gradient_product,
    kronecker,
    less,
    preconditioned,
    refined,
    self_influence,
    sketched_kronecker,
    tracin,
    trak,
)
from attribute.methods._estimator import Estimator, estimator_named, estimators, register_estimator
from attribute.methods._registry import Method, method_named, register_method
from attribute.methods._settings import OPTIONS, require_used
from attribute.methods._study import Checkpoint, Study

__all__ = [
    "Checkpoint",
    "Estimator",
    "Method",
    "OPTIONS",
    "Study",
    "adam_cg",
    "baselines",
    "datainf",
    "estimator_named",
    "estimators",
    "grad_cos",
    "grad_dot",
    "gradient_product",
    "kronecker",
    "less",
    "method_named",
    "preconditioned",
    "refined",
    "register_estimator",
    "register_method",
    "require_used",
    "self_influence",
    "sketched_kronecker",
    "tracin",
    "trak",
]
