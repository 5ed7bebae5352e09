"""Gated (Rajamanoharan et al. 2024a, §3): a gate decides which latents are active, a second map with shared directions
how much.

The gate's pre-activations are a = W (x − c) + b; magnitudes are exp(r_mag) (a − b) + b_mag. The loss is the L1 of the
gate plus the error of reconstructing from the gate through a decoder that gets no gradient (eqs. 8 and 9).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify._select import Above, Rule
from sparsify._sparse import Routes, decode
from sparsify.activations._base import Activation, Batch, per_entry

if TYPE_CHECKING:
    from sparsify._coder import SparseCoder


class Gated(Activation):
    """Two maps, one set of directions."""

    scale_free = False

    def add_parameters(self, coder: SparseCoder, made: dict[str, Any]) -> None:
        """The magnitudes' log-scales and biases."""
        coder.r_mag = nn.Parameter(torch.zeros(coder.num_latents, **made))
        coder.b_mag = nn.Parameter(torch.zeros(coder.num_latents, **made))

    def rule(self, coder: SparseCoder, k: int) -> Rule:
        """Every open gate."""
        return Above(coder.encoder.bias.new_zeros(()))

    def values(self, coder: SparseCoder, products: Tensor, routes: Routes) -> Tensor:
        """Magnitudes behind open gates."""
        shared = products - per_entry(coder.encoder.bias, routes)
        scale, shift = per_entry(coder.r_mag.exp(), routes), per_entry(coder.b_mag, routes)
        return routes.masked((scale * shared + shift).relu())

    def loss(
        self, coder: SparseCoder, products: Tensor, routes: Routes, k: int, target: Tensor, batch: Batch
    ) -> Tensor:
        """L1 of the gate, relative to √k standard deviations of a token, plus the gate's own FVU."""
        gate, decoder = products.relu(), coder.decoder_rows().detach()
        guess = decode(gate, routes, decoder) + coder.b_dec.detach()
        scale = (batch.variance / batch.tokens).sqrt()
        l1 = (gate * per_entry(decoder.norm(dim=1), routes)).sum() / (batch.tokens * scale * k**0.5)
        return l1 + (target - guess).square().sum() / batch.variance


ACTIVATION = Gated()
