"""Gradients of a training while it runs: the very backward passes that train the model, row by row."""

from attribute.training._callback import GradientCollectorCallback
from attribute.training._prepare import prepare_for_gradient_collection

__all__ = ["GradientCollectorCallback", "prepare_for_gradient_collection"]
