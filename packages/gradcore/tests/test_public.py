"""The public surface is what it says, and importing it brings torch alone."""

from __future__ import annotations

import subprocess
import sys

import gradcore


def test_every_public_name_exists_and_is_documented():
    for name in gradcore.__all__:
        assert getattr(gradcore, name) is not None
        if callable(getattr(gradcore, name)):
            assert getattr(gradcore, name).__doc__, name
    assert sorted(gradcore.__all__) == gradcore.__all__


def test_import_brings_nothing_heavier_than_torch():
    code = "import sys, gradcore; print([m for m in ('transformers', 'datasets', 'gradstore') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_docstring_examples_run():
    import doctest
    import importlib
    import pkgutil

    attempted = 0
    for module in pkgutil.walk_packages(gradcore.__path__, "gradcore."):
        outcome = doctest.testmod(
            importlib.import_module(module.name), extraglobs=vars(gradcore) | {"torch": __import__("torch")}
        )
        assert outcome.failed == 0, module.name
        attempted += outcome.attempted
    assert attempted > 15
