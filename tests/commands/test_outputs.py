"""No command writes over its inputs, and what cannot be written is refused before a model is loaded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

import fastres
from fastres.commands.cli import main
from fastres.weights import sources

WEIGHTS = Path(fastres.__file__).parent / "data" / "resnet20_digits.safetensors"
DIGITS = ["--model", "resnet20_digits"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("cat.png")
    for name in ("w.pth", "w.png", "server/resnet20_digits/w.pth", "cache/checkpoints/resnet50-11ad3fa6.pth"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(WEIGHTS, name)
    Path("server/resnet20_digits/config.pbtxt").touch()
    Path("names.onnx").write_text("".join(f"{digit}\n" for digit in range(10)))
    Path("other/resnet20_digits").mkdir(parents=True)
    Path("other/resnet20_digits/mine").touch()
    Path("photos").mkdir()
    shutil.copy("cat.png", "photos/1.png")
    os.link("cat.png", "hard.png")
    os.symlink("cat.png", "soft.png")
    os.mkfifo("fifo.png")
    os.mkdir("folder.png")
    monkeypatch.setattr(sources, "cache_folder", lambda: tmp_path / "cache" / "checkpoints")
    monkeypatch.setattr(fastres.model.loading, "load_state", lambda *_: pytest.fail("it loaded the model first"))  # type: ignore[attr-defined]
    return tmp_path


LOOK, EXPORT = ["look", "cat.png", *DIGITS, "-o"], ["export", "resnet20_digits"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*LOOK, "cat.png"], "is the input"),
        ([*LOOK, "hard.png"], "is the input"),
        ([*LOOK, "soft.png"], "is the input"),
        ([*LOOK, "w.png", "--weights", "./w.png"], "is the input"),
        ([*LOOK, "fifo.png"], "named pipe"),
        ([*LOOK, "folder.png"], "folder"),
        ([*LOOK, "none/look.png"], "does not exist"),
        (["look", "photos", *DIGITS], "is a folder"),
        (["look", "fifo.png", *DIGITS], "is a named pipe"),
        ([*EXPORT, "w.pth", "--weights", "w.pth"], "is the input"),
        ([*EXPORT, "--torch", "w.pth", "--weights", "w.pth"], "is the input"),
        ([*EXPORT, "names.onnx", "--categories", "names.onnx"], "is the input"),
        ([*EXPORT, "--categories", "names.onnx", "names.onnx"], "is the input"),
        ([*EXPORT, "photos/1.png", "--int8", "--calibration", "photos"], "is the input"),
        (["export", "resnet50", "cache/checkpoints/resnet50-11ad3fa6.pth"], "is the input"),
        ([*EXPORT, "--server-repository", "server", "--weights", "server/resnet20_digits/w.pth"], "holds the input"),
        ([*EXPORT, "--server-repository", "other"], "something other"),
        ([*EXPORT, "--server-repository", "cat.png"], "is a file"),
        ([*EXPORT, "fifo.png"], "named pipe"),
        ([*EXPORT, "/dev/null"], "a device"),
        ([*EXPORT, os.fsdecode(b"\xe9.onnx")], "not a name in UTF-8"),
        (["demo", "--out", "fifo.png"], "named pipe"),
        (["bench", *DIGITS, "--out", "cat.png"], "cannot be used"),
        (["bench", *DIGITS, "--out", "cat.png/in"], "cannot be used"),
    ],
)
def test_an_impossible_output_is_refused_before_the_work(
    arguments: list[str], words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastres")
    assert words in said
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_names_that_are_not_utf_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    picture, weights, names, out, torch_file = (
        os.fsdecode(name) for name in (b"\xe9$_{.png", b"w\xe9.safetensors", b"n\xe9.txt", b"o\xe9.svg", b"o\xe9.pt2")
    )
    Image.new("RGB", (16, 16)).save("x.png")
    os.rename("x.png", picture)
    shutil.copy(WEIGHTS, weights)
    Path(names).write_text("".join(f"${digit}_{{\n" for digit in range(10)))
    given = [*DIGITS, "--weights", weights, "--categories", names]
    assert main(["look", picture, *given, "-o", out]) == 0
    assert main(["predict", picture, *given]) == 0
    assert main(["inspect", weights]) == 0
    assert (
        main(["export", "resnet20_digits", "o.onnx", "--no-verify", "--weights", weights, "--categories", names]) == 0
    )
    assert main(["export", "resnet20_digits", "--torch", torch_file, "--no-verify", "--weights", weights]) == 0
    assert Path(out).is_file()
    assert Path(torch_file).is_file()
    assert r"w\xe9.safetensors" in capsys.readouterr().out


def test_pipes_as_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe without a writer is refused at once. Class names can come from a pipe that a program writes to."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo.pth")
    os.mkfifo("config.json")
    Image.new("RGB", (16, 16)).save("cat.png")
    for arguments in (
        ["predict", "cat.png", *DIGITS, "--weights", "fifo.pth"],
        ["predict", "cat.png", *DIGITS, "--categories", "fifo.pth"],
        ["predict", "cat.png", "--model", "."],
        ["inspect", "fifo.pth"],
        ["inspect", "."],
        ["export", "--inspect", "fifo.pth"],
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
    reading, writing = os.pipe()
    os.write(writing, "".join(f"digit {digit}\n" for digit in range(10)).encode())
    os.close(writing)
    assert main(["predict", "cat.png", *DIGITS, "--categories", f"/dev/fd/{reading}"]) == 0
    os.close(reading)
    assert "digit" in capsys.readouterr().out
