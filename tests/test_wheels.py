"""Each member's wheel works with what it declares and nothing else of ours.

The wheels are built by the build backend itself. A fresh interpreter without site-packages gets them, then the
installed packages behind a gate that lets through only what the members' metadata requires, down to the last one: what
a wheel forgot to declare cannot be imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _readme(member: str, *checks: str) -> str:
    """The Python blocks of a member's README, one after the other, each with what must hold after it."""
    text = (ROOT / "packages" / member / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == len(checks)
    return "\n".join(f"{block}\nassert {check}\n" for block, check in zip(blocks, checks))


# Member → members whose wheels come with it, and what to try.
MEMBERS = {
    "gradcore": (
        (),
        _readme(
            "gradcore",
            'collector.gradients["0"].shape == (32, 64, 20) and norms.keys() == {"0", "2"}',
            'collector.gradients["0"].shape == (6, 4, 10)',
            'collector.gradients["2"].shape == (32, 3, 65) and norms["0"].shape == (32,)',
        ),
    ),
    "gradstore": (
        (),
        """
import tempfile
import numpy as np
from gradstore import GradientStore, StoreWriter, search
rows = np.eye(3, 4, dtype=np.float32)
with tempfile.TemporaryDirectory() as folder:
    with StoreWriter.create(folder + "/s", rows=3, columns={"a": 4}, plan={}, side_columns=()) as writer:
        writer.write_data({"text": str(row)} for row in range(3))
        writer.write(0, rows, {})
    assert search(GradientStore.open(folder + "/s"), rows, 1).top_rows.tolist() == [[0], [1], [2]]
""",
    ),
    "attribute": (
        ("gradcore", "gradstore"),
        "import attribute\nfor name in attribute.__all__: getattr(attribute, name)",
    ),
    "sparsify": (("gradcore",), "import sparsify\nfor name in sparsify.__all__: getattr(sparsify, name)"),
    "probing": (("gradcore",), "import probing\nfor name in probing.__all__: getattr(probing, name)"),
    "cli": (
        ("gradcore", "gradstore", "attribute"),
        """
from trace_cli.main import main
for command in ([], ["build"], ["query"], ["store"]):
    try:
        main([*command, "--help"])
    except SystemExit as done:
        assert not done.code
import trace_cli._config, attribute.index, attribute.query
""",
    ),
}
OURS = {"gradcore", "gradstore", "attribute", "sparsify", "probing", "trace_cli"}

GATE = '''
import json, re, sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
wheels, installed, declared, ours, code = json.loads(sys.stdin.read())
sys.path[:0] = wheels
sys.path.append(installed)

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

def closure(requirements):
    from packaging.requirements import Requirement
    wanted, todo = set(), [(Requirement(each), "") for each in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        key = (normal(requirement.name), tuple(sorted(requirement.extras)))
        if key in wanted:
            continue
        wanted.add(key)
        try:
            inner = distribution(requirement.name).requires or []
        except PackageNotFoundError:
            continue
        todo += [(Requirement(each), extra) for each in inner for extra in ("", *requirement.extras)]
    return {name for name, _ in wanted}

allowed = closure(declared)
owners = {name: {normal(each) for each in found} for name, found in packages_distributions().items()}
for name in [each for each in sys.modules if each.partition(".")[0] == "packaging"]:
    del sys.modules[name]

class Gate:
    """Finds what is declared; the rest is not there."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in owners and top not in ours and not owners[top] & allowed:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Gate(each) if getattr(each, "__name__", "") == "PathFinder" else each for each in sys.meta_path]
exec(code, {"__name__": "__main__"})
strays = [name for name in ours if name in sys.modules and not any(
    (sys.modules[name].__file__ or "").startswith(wheel) for wheel in wheels)]
assert not strays, strays
'''


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    found: dict[str, Path] = {}
    for member in MEMBERS:
        target = folder / member
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
        done = subprocess.run(
            command, cwd=ROOT / "packages" / member, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        (found[member],) = target.glob("*.whl")
    return found


def metadata(wheel: Path) -> list[str]:
    """What a wheel requires without extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
        found = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    return [each for each in found if "extra ==" not in each]


@pytest.mark.parametrize("member", MEMBERS)
def test_a_wheel_works_with_what_it_declares(member, wheels):
    company, code = MEMBERS[member]
    present = [wheels[each] for each in (member, *company)]
    required = {each for wheel in present for each in metadata(wheel)}
    payload = json.dumps(
        [[str(each) for each in present], sysconfig.get_paths()["purelib"], sorted(required), sorted(OURS), code]
    )
    command = [sys.executable, "-I", "-S", "-c", GATE]
    done = subprocess.run(command, input=payload, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("member", MEMBERS)
def test_a_wheel_holds_the_package_its_types_and_its_licence(member, wheels):
    with zipfile.ZipFile(wheels[member]) as archive:
        names = archive.namelist()
    package = "trace_cli" if member == "cli" else member
    source = ROOT / "packages" / member / "src"
    for path in source.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(source).as_posix() in names
    assert f"{package}/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if "test" in name.split("/")[0]]


def test_gradcore_requires_torch_and_nothing_else(wheels):
    assert [each.partition(">")[0] for each in metadata(wheels["gradcore"])] == ["torch"]
