"""``nn.Embedding``: row id_s of the table is looked up, so G = Σ_s onehot(id_s) g_sᵀ with shape [entries, width].

The one-hot factor is never written out: a sketch of it is a lookup in the sketch matrix. Padding entries get no
gradient, as in torch.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from gradcore._factors import OneHot
from gradcore.layers._registry import Layer, Side, register_layer
from gradcore.layers.linear import positions


@register_layer
class Embedding(Layer):
    """Lookup tables."""

    kind: ClassVar[str] = "embedding"
    forward_side: ClassVar[Side] = "out"

    def matches(self, module: nn.Module) -> bool:
        """Tables without rescaling: ``max_norm`` changes the weights in the forward pass."""
        return isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq

    def shape(self, module: nn.Module, bias: bool) -> tuple[int, int]:
        """``(entries, width)``."""
        table = cast(nn.Embedding, module)
        return table.num_embeddings, table.embedding_dim

    def forward(self, module: nn.Module, given: Tensor, bias: bool) -> OneHot:
        """Which entry each position looked up."""
        table = cast(nn.Embedding, module)
        ids = given.reshape(len(given), -1)
        if table.padding_idx is not None:
            ids = torch.where(ids == table.padding_idx, -1, ids)
        return OneHot(ids, table.num_embeddings)

    def backward(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """The gradient of what was found."""
        return positions(gradient)
