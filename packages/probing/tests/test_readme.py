"""The README's example runs as it stands."""

import re
from pathlib import Path


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "variable.json").exists()
    assert re.match(r"0\.\d+ \[0\.\d+, 0\.\d+\] -?\d", capsys.readouterr().out)
