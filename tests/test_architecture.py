"""The house has the rooms it says, and arrows between them point one way."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "gradcore": "gradcore",
    "gradstore": "gradstore",
    "attribute": "attribute",
    "sparsify": "sparsify",
    "probing": "probing",
    "cli": "trace_cli",
}
# Member → members of ours that it may import.
ARROWS = {
    "gradcore": set[str](),
    "gradstore": set[str](),
    "attribute": {"gradcore", "gradstore"},
    "sparsify": {"gradcore"},
    "probing": {"gradcore"},
    "trace_cli": {"gradcore", "gradstore", "attribute", "sparsify", "probing"},
}
# What the two foundations may import of others' at import time; `LAZY` only inside functions.
FOUNDATION = {"gradcore": {"torch"}, "gradstore": {"numpy", "safetensors", "threadpoolctl", "xxhash"}}
LAZY = {"gradcore": set[str](), "gradstore": {"faiss"}}
# Import names whose distribution is called otherwise.
OPTIONAL = {"wandb"}  # a logger that a person may have; asked for by name and missed with a clear error
DISTRIBUTIONS = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub", "trace_cli": "trace-cli"}

Import = tuple[str, bool, str]  # top-level module, inside a function or TYPE_CHECKING, where


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / "packages" / folder / "src").rglob("*.py"))


def imports(path: Path) -> Iterator[Import]:
    yield from _imports(ast.parse(path.read_text(encoding="utf-8")), False, path)


def _imports(node: ast.AST, lazy: bool, path: Path) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        where = f"{path.relative_to(ROOT)}:{getattr(child, 'lineno', 0)}"
        if isinstance(child, ast.Import):
            yield from ((alias.name.partition(".")[0], lazy, where) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{where}: relative import"
            yield (child.module or "").partition(".")[0], lazy, where
        else:
            guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, lazy or guarded or inside, path)


@pytest.mark.parametrize("folder", PACKAGES)
def test_arrows_point_one_way(folder):
    module = PACKAGES[folder]
    ours = set(PACKAGES.values()) - {module}
    wrong = [
        f"{where} imports {name}"
        for path in sources(folder)
        for name, _, where in imports(path)
        if name in ours - ARROWS[module]
    ]
    assert sources(folder)
    assert not wrong


@pytest.mark.parametrize("module", FOUNDATION)
def test_foundations_stand_on_little(module):
    allowed = FOUNDATION[module] | {module} | set(sys.stdlib_module_names)
    wrong = [
        f"{where} imports {name}"
        for path in sources(module)
        for name, lazy, where in imports(path)
        if name not in allowed | (LAZY[module] if lazy else set[str]())
    ]
    assert not wrong


@pytest.mark.parametrize("folder", PACKAGES)
def test_what_is_imported_is_declared(folder):
    """Installed alone, a member finds what it imports; extras are for what is imported inside functions."""
    project = tomllib.loads((ROOT / "packages" / folder / "pyproject.toml").read_text())["project"]
    required = _names(project["dependencies"])
    extra = _names(each for group in project.get("optional-dependencies", {}).values() for each in group)
    known = set(sys.stdlib_module_names) | {PACKAGES[folder]} | OPTIONAL
    undeclared = {
        f"{where} imports {name}"
        for path in sources(folder)
        for name, lazy, where in imports(path)
        if name not in known and DISTRIBUTIONS.get(name, name) not in (required | extra if lazy else required)
    }
    # transformers brings these along, and means to.
    brought = {"huggingface_hub", "tokenizers", "safetensors"} if "transformers" in required else set[str]()
    brought |= {"pyarrow"} if "datasets" in required else set[str]()
    # torch's CUDA builds bring Triton; only `sparsify.kernels.tiled` needs it, and is imported where it is.
    brought |= {"triton", "triton.language"} if folder == "sparsify" else set[str]()
    assert not {each for each in undeclared if each.rpartition(" ")[2] not in brought}


def _names(requirements) -> set[str]:
    import re

    found = {re.split(r"[^\w.-]", each, maxsplit=1)[0].lower() for each in requirements}
    return {"faiss" if each.startswith("faiss") else each for each in found}


@pytest.mark.parametrize("folder", PACKAGES)
def test_every_member_is_complete(folder):
    member = ROOT / "packages" / folder
    package = member / "src" / PACKAGES[folder]
    for path in (member / "README.md", member / "LICENSE", member / "pyproject.toml", package / "py.typed"):
        assert path.is_file(), path
    assert list((member / "tests").rglob("test_*.py")), "no tests"
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    assigned = {
        target.id
        for node in tree.body
        for target in (node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)])
        if isinstance(target, ast.Name)
    }
    assert "__all__" in assigned


@pytest.mark.parametrize("folder", PACKAGES)
def test_library_code_does_not_print(folder):
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(folder)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong


def test_members_have_one_version():
    versions = {
        folder: tomllib.loads((ROOT / "packages" / folder / "pyproject.toml").read_text())["project"]["version"]
        for folder in PACKAGES
    }
    assert len(set(versions.values())) == 1, versions


def test_the_workspace_has_the_members_it_says():
    found = {path.parent.name for path in (ROOT / "packages").glob("*/pyproject.toml")}
    assert found == set(PACKAGES)
