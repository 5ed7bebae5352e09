"""Attribution methods, one file each, found by name (docs/add-a-method.md)."""

from attribute.methods import grad_cos, grad_dot
from attribute.methods._registry import Method, method_named, register_method

__all__ = ["Method", "grad_cos", "grad_dot", "method_named", "register_method"]
