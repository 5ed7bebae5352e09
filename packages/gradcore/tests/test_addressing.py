"""Patterns select what they say, and a miss says what was meant."""

from __future__ import annotations

import pytest
from gradcore_models import TinyLM
from torch import nn

from gradcore import SelectionError, select_modules


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("blocks.0.up", ["blocks.0.up"]),
        ("blocks.*.up", ["blocks.0.up", "blocks.1.up"]),
        ("blocks.[1].*", ["blocks.1.norm", "blocks.1.up", "blocks.1.down"]),
        (["head", "embed"], ["embed", "head"]),
        (r"re:blocks\.\d\.(up|down)", ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
    ],
)
def test_selection_is_in_the_models_order(patterns, expected):
    assert select_modules(TinyLM(), patterns) == expected
    names = [name for name, _ in TinyLM().named_modules()]
    assert select_modules(names, patterns) == expected


def test_exclude_and_where():
    linear = select_modules(TinyLM(), where=lambda _, module: isinstance(module, nn.Linear))
    assert linear == ["blocks.0.down", "blocks.1.down", "head"]
    assert select_modules(TinyLM(), "blocks.*", exclude="*.norm", where=lambda name, _: name.count(".") == 2) == [
        "blocks.0.up",
        "blocks.0.down",
        "blocks.1.up",
        "blocks.1.down",
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: select_modules(m, "blocks.0.dwon"), r"did you mean: blocks.0.down"),
        (lambda m: select_modules(m, "model.layers.0.down"), r"down"),
        (lambda m: select_modules(m, ["head", "nothing"]), r"'nothing' matches no module"),
        (lambda m: select_modules(m, "re:("), r"does not compile"),
        (lambda m: select_modules(m, "head", exclude="head"), r"removes every module"),
        (lambda m: select_modules(m, exclude="hed"), r"did you mean: head"),
        (lambda m: select_modules(m, "embed", where=lambda _, x: isinstance(x, nn.Linear)), r"cannot be used here"),
        (lambda m: select_modules(["a"], where=lambda *_: True), r"pass the model itself"),
        (lambda m: select_modules(nn.Identity()), r"no module is selected"),
    ],
)
def test_misses_are_explained(call, message):
    with pytest.raises(SelectionError, match=message):
        call(TinyLM())
