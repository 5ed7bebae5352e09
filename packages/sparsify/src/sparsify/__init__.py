"""Sparse autoencoders and transcoders on the activations of any transformer.

>>> from sparsify import Sae
>>> sae = Sae.load_from_hub("EleutherAI/sae-llama-3-8b-32x", hookpoint="layers.10")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsify._config import SaeConfig, SparseCoderConfig, TrainConfig, TranscoderConfig
from sparsify._errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FormatError,
    HookpointError,
    SparsifyError,
    SparsifyWarning,
)

if TYPE_CHECKING:
    from sparsify._cache import ActivationCache, build_cache
    from sparsify._coder import EncoderOutput, ForwardOutput, Sae, SparseCoder
    from sparsify._contexts import Context, Latent, top_contexts
    from sparsify._dashboard import write_dashboard
    from sparsify._evaluate import Evaluation, evaluate, grafted
    from sparsify._hub import push_to_hub
    from sparsify._plots import plot_evaluation
    from sparsify._trainer import SaeTrainer, Trainer

__all__ = [
    "Sae",
    "SaeConfig",
    "SparseCoder",
    "SparseCoderConfig",
    "TranscoderConfig",
    "EncoderOutput",
    "ForwardOutput",
    "TrainConfig",
    "Trainer",
    "SaeTrainer",
    "ActivationCache",
    "build_cache",
    "Evaluation",
    "evaluate",
    "grafted",
    "plot_evaluation",
    "Context",
    "Latent",
    "top_contexts",
    "write_dashboard",
    "push_to_hub",
    "SparsifyError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FormatError",
    "HookpointError",
    "SparsifyWarning",
]

# Names that need torch are imported on first use: `python -m sparsify --help` must not pay for it.
_LAZY = {
    "Sae": "sparsify._coder",
    "SparseCoder": "sparsify._coder",
    "EncoderOutput": "sparsify._coder",
    "ForwardOutput": "sparsify._coder",
    "Trainer": "sparsify._trainer",
    "ActivationCache": "sparsify._cache",
    "build_cache": "sparsify._cache",
    "Evaluation": "sparsify._evaluate",
    "evaluate": "sparsify._evaluate",
    "grafted": "sparsify._evaluate",
    "plot_evaluation": "sparsify._plots",
    "Context": "sparsify._contexts",
    "Latent": "sparsify._contexts",
    "top_contexts": "sparsify._contexts",
    "write_dashboard": "sparsify._dashboard",
    "push_to_hub": "sparsify._hub",
    "SaeTrainer": "sparsify._trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sparsify' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
