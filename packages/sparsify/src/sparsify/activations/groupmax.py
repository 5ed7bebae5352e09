"""GroupMax: the largest of each of k contiguous groups of latents, so that each group always has one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify._select import GroupMax as LargestOfGroups
from sparsify._select import Rule
from sparsify.activations._base import Activation

if TYPE_CHECKING:
    from sparsify._coder import SparseCoder


class GroupMax(Activation):
    """One winner a group."""

    def rule(self, coder: SparseCoder, k: int) -> Rule:
        """k groups."""
        return LargestOfGroups(k)


ACTIVATION = GroupMax()
