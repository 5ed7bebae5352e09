"""Per-example gradients of any torch model, by hooks."""

from gradcore._addressing import select_modules
from gradcore._errors import CaptureError, GradCoreError, PlanMismatch, SelectionError

__all__ = ["CaptureError", "GradCoreError", "PlanMismatch", "SelectionError", "select_modules"]
