"""``fastres photographs``: real photographs in a folder; what is there already is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fastres.commands.cli import main


def test_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photographs").mkdir()
    Path("photographs/cat.jpg").write_bytes(b"mine")
    assert main(["photographs"]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(paths) == 8
    assert {path.as_posix() for path in paths} > {"photographs/cat.jpg", "photographs/coffee.jpg"}
    assert sorted(paths) == sorted(Path("photographs").iterdir())
    assert Path("photographs/cat.jpg").read_bytes() == b"mine"
    for path in paths:
        if path.name != "cat.jpg":
            with Image.open(path) as image:
                assert image.mode == "RGB"
                assert min(image.size) > 300


def test_a_place_that_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["photographs", str(tmp_path / "file")]) == 2
    assert "cannot be written to" in capsys.readouterr().err
