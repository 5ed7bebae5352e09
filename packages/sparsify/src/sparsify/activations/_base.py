"""What an activation says of itself. It holds no state: parameters and buffers live on the coder, under own names."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from sparsify._select import Rule
from sparsify._sparse import Routes

if TYPE_CHECKING:
    from sparsify._coder import SparseCoder


class Batch(NamedTuple):
    """The batch that a chunk of tokens belongs to; chunks of it may be with other processes."""

    variance: Tensor
    """Σ‖y − ȳ‖² over the whole batch."""
    tokens: float | Tensor
    """Tokens in the whole batch."""
    total: Callable[[Tensor], Tensor]
    """From a sum over this chunk's tokens to the sum over the whole batch's, without its gradient."""


class Activation:
    """An activation with the defaults of TopK's kind: chosen products, rectified, and no loss of their own.

    >>> activation_named("groupmax").scale_free
    True
    """

    counts_batch = False
    """Whether the loss asks `Batch.total` for the number of active latents of the whole batch."""
    cuttable = True
    """Whether a chunk of a batch has the code that it has within the batch."""
    scale_free = True
    """Whether the choice stays the same when all products are multiplied by one positive number."""

    def add_parameters(self, coder: SparseCoder, made: dict[str, Any]) -> None:
        """Give the coder the parameters and buffers that this activation needs; ``made`` holds dtype and device."""

    def rule(self, coder: SparseCoder, k: int) -> Rule:
        """Which products are kept."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: an activation needs a rule")

    def values(self, coder: SparseCoder, products: Tensor, routes: Routes) -> Tensor:
        """Activations (N, K) of the kept products."""
        return products.relu()

    def loss(
        self, coder: SparseCoder, products: Tensor, routes: Routes, k: int, target: Tensor, batch: Batch
    ) -> Tensor | None:
        """A chunk's share of a sparsity loss of the batch, where nothing else bounds the number of active latents.

        Shares, and their gradients, add up to the loss of the batch in one piece.
        """
        return None

    def initialise(self, coder: SparseCoder, x: Tensor) -> None:
        """Fit what a first batch (N, D) can tell."""

    def observe(self, coder: SparseCoder, acts: Tensor) -> None:
        """See the activations (N, K) of a training batch."""

    def after_step(self, coder: SparseCoder) -> None:
        """Project parameters back onto their constraints."""


def activation_named(name: str) -> Activation:
    """The activation in the file of that name; `SaeConfig` has refused unknown names."""
    found = import_module(f"sparsify.activations.{name}").ACTIVATION
    assert isinstance(found, Activation)
    return found


def per_entry(values: Tensor, routes: Routes) -> Tensor:
    """Values (M,) of each latent where its entries stand, (N, K)."""
    return values.index_select(0, routes.indices.flatten()).view(routes.indices.shape)
