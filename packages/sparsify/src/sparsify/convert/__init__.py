"""Dictionaries of other libraries: read into `SparseCoder`, written out of it, refused where it cannot be exact.

>>> from sparsify import convert
>>> found = convert.load("gemma-sae/layer_12")  # doctest: +SKIP
>>> found.layout, found.coder.cfg.activation  # doctest: +SKIP
('saelens', 'jumprelu')
>>> convert.save({"layers.12": found.coder}, "out", "dictionary_learning")  # doctest: +SKIP

Add a layout by writing one module with `matches`, `load`, `plan` and `save` and naming it in `_LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sparsify._coder import SparseCoder
from sparsify._errors import FormatError, check_choice
from sparsify.convert import _circuit_tracer, _dictionary_learning, _foreign, _saelens, _sparsify

__all__ = ["LAYOUTS", "Imported", "load", "refusal", "save"]

_LAYOUTS: dict[str, Any] = {
    "sparsify": _sparsify,
    "saelens": _saelens,
    "dictionary_learning": _dictionary_learning,
    "circuit_tracer": _circuit_tracer,
}
LAYOUTS = tuple(_LAYOUTS)


class Imported(NamedTuple):
    """Which layout was found, and the coders in it by name; a folder of one coder names it by its own name."""

    layout: str
    coders: dict[str, SparseCoder]

    @property
    def coder(self) -> SparseCoder:
        """The only coder."""
        if len(self.coders) != 1:
            raise FormatError(f"there are {len(self.coders)} coders, not one: {', '.join(list(self.coders)[:8])}")
        return next(iter(self.coders.values()))


def load(
    path: str | Path,
    *,
    layout: str | None = None,
    allow_pickle: bool = False,
    dict_class: str | None = None,
    act_mean: str | None = None,
) -> Imported:
    """Read a foreign checkpoint.

    Args:
        path: a folder, or a single file of weights.
        layout: one of LAYOUTS; found out by default, and refused where the files leave a doubt.
        allow_pickle: read ``.pt`` files too, restricted to tensors and plain values.
        dict_class: dictionary_learning's class, where no config.json names it.
        act_mean: for files that carry an ``act_mean``: "fold" it into the biases (the training data had it subtracted)
            or "ignore" it.

    Raises:
        FormatError: nothing is recognised, or it computes something a SparseCoder cannot.
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path} does not exist")
    if layout is not None:
        check_choice("layout", layout, LAYOUTS)
    options = _foreign.Options(allow_pickle, dict_class, act_mean)
    seen = layout or next((name for name, module in _LAYOUTS.items() if module.matches(path, options)), None)
    if seen is None:
        raise FormatError(_foreign.why_not(path, allow_pickle))
    return Imported(seen, _LAYOUTS[seen].load(path, options))


def refusal(coders: Mapping[str, SparseCoder], layout: str, *, metadata: Mapping[str, Any] | None = None) -> str | None:
    """Why `save` would refuse these coders; None where it would write them.

    >>> from sparsify import SaeConfig
    >>> refusal({"layers.0": SparseCoder(4, SaeConfig("groupmax", k=2))}, "saelens")
    'layers.0 cannot be written in the saelens layout: no other library has the groupmax activation'
    """
    check_choice("layout", layout, LAYOUTS)
    try:
        _LAYOUTS[layout].plan(dict(coders), dict(metadata or {}), False)
    except FormatError as error:
        return str(error)
    return None


def save(
    coders: Mapping[str, SparseCoder],
    folder: str | Path,
    layout: str,
    *,
    metadata: Mapping[str, Any] | None = None,
    allow_inexact: bool = False,
) -> None:
    """Write coders, by hookpoint, in a library's layout under ``folder``.

    Args:
        metadata: what the layout also wants to know, such as ``model_name`` (and, for circuit_tracer,
            ``feature_input_hook`` and ``feature_output_hook``).
        allow_inexact: write a TopK transcoder for circuit_tracer although its top-k applies no ReLU: equal for tokens
            with at least k positive pre-activations only.

    Raises:
        FormatError: the layout cannot express a coder exactly; the message says why.
    """
    check_choice("layout", layout, LAYOUTS)
    _LAYOUTS[layout].save(dict(coders), Path(folder), dict(metadata or {}), allow_inexact)
