"""The README's Python runs as it stands, in order, in an empty folder."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_readme_runs(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    shown = capsys.readouterr().out
    # 16 x 8 + 8 x 64 and 64 x 8 + 8 x 64 for two adapters, 64 x 4 + 4 for the head
    assert "trainable parameters: 1,924 of" in shown
    assert "logits/kernel" in shown and "0.004" in shown
    for name in ("adapter", "small", "run"):
        assert (tmp_path / f"{name}.safetensors").exists()
