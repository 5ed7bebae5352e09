"""Which training examples made a language model behave as it does.

Heavy parts load when they are first used, so that ``import attribute`` alone costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attribute._errors import AttributionError, DataError, ModelError, RunError
    from attribute.attributor import Attribution, Attributor, Hit
    from attribute.config import DataConfig, IndexConfig, QueryConfig
    from attribute.dataset_view import load_gradient_dataset
    from attribute.index import build_index, collect_gradients
    from attribute.model import LanguageModel
    from attribute.query import Asker
    from attribute.training import GradientCollectorCallback, prepare_for_gradient_collection
    from gradstore import FaissConfig

_WHERE = {
    "Asker": "query",
    "Attribution": "attributor",
    "AttributionError": "_errors",
    "Attributor": "attributor",
    "DataConfig": "config",
    "DataError": "_errors",
    "FaissConfig": "attributor",
    "GradientCollectorCallback": "training",
    "Hit": "attributor",
    "IndexConfig": "config",
    "LanguageModel": "model",
    "ModelError": "_errors",
    "QueryConfig": "config",
    "RunError": "_errors",
    "build_index": "index",
    "collect_gradients": "index",
    "load_gradient_dataset": "dataset_view",
    "prepare_for_gradient_collection": "training",
}

__all__ = [
    "Asker",
    "Attribution",
    "AttributionError",
    "Attributor",
    "DataConfig",
    "DataError",
    "FaissConfig",
    "GradientCollectorCallback",
    "Hit",
    "IndexConfig",
    "LanguageModel",
    "ModelError",
    "QueryConfig",
    "RunError",
    "build_index",
    "collect_gradients",
    "load_gradient_dataset",
    "prepare_for_gradient_collection",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'attribute' has no attribute {name!r}")
    return getattr(import_module(f"attribute.{_WHERE[name]}"), name)
