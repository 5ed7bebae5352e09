"""Flags of models lent to circuits: kept when the first borrows a model, put back when the last gives it up."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, WeakSet

from torch import nn


@dataclass
class _Loan:
    """By name: a reference to the model's own parts would keep it alive."""

    training: dict[str, bool]
    gradients: dict[str, bool]
    holders: WeakSet[Hashable] = field(default_factory=WeakSet)


_LOANS: WeakKeyDictionary[nn.Module, _Loan] = WeakKeyDictionary()


def borrowed(model: nn.Module, holder: Hashable) -> None:
    """Note that ``holder`` may change the training and gradient flags of the model."""
    loan = _LOANS.get(model)
    if loan is None or not loan.holders:
        loan = _LOANS[model] = _Loan(
            {name: module.training for name, module in model.named_modules()},
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        )
    loan.holders.add(holder)


def given_back(model: nn.Module, holder: Hashable) -> None:
    """Note that ``holder`` is done; the flags are what they were once nobody else has the model."""
    loan = _LOANS.get(model)
    if loan is None or holder not in loan.holders:
        return
    loan.holders.discard(holder)
    if loan.holders:
        return
    for name, module in model.named_modules():
        module.training = loan.training.get(name, module.training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(loan.gradients.get(name, parameter.requires_grad))
    del _LOANS[model]
