"""Errors of the command line speak of its options and commands, not of Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastres.bench.run import main as bench
from fastres.commands.cli import main
from fastres.wording import Wording

# What a shell has no use for: calls, arguments of calls, objects in memory.
OF_PYTHON = re.compile(r"(fastres|model)\.\w+\(|\b[a-z_]+=(?!['\d])|state dict|\b(None|True|False)\b|enum member")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("copy it, or pass weights=<path>, or weights=None for random weights.", "copy it, or pass --weights PATH."),
        ("top_k is 0; give a whole number", "--top-k is 0; give a whole number"),
        ("give the names with categories=", "give the names with --categories"),
        ("fastres.list_models() lists all.", "'fastres list' lists all."),
        ("Call fastres.load('a/b') to load resnet18.", "give --model 'a/b' to load resnet18."),
        ("pass transforms= there", "pass transforms= there"),
        ("the file 'weights=1.pth' and x.weights=2", "the file 'weights=1.pth' and x.weights=2"),
        ("The weights is here", "The weights is here"),
    ],
)
def test_messages(message: str, expected: str) -> None:
    assert Wording(["-o", "--weights", "--top-k", "--categories", "--model"])(message) == expected


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from fastres.bench.digits.data import as_image, load_scans

    monkeypatch.chdir(tmp_path)
    as_image(load_scans()[0][0]).save("a.png")
    Path("names.txt").write_text("one\ntwo\n")
    Path("empty").mkdir()
    Path("text.pth").write_text("hello")
    monkeypatch.setenv("FASTRES_WEIGHTS_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


DIGITS = "--model resnet20_digits"


@pytest.mark.parametrize(
    "command",
    [
        "predict a.png --model resnet5O",
        "predict a.png --model some/folder",
        "predict a.png --model nowhere.safetensors",
        "predict a.png --model resnet18",
        "predict a.png --model resnet18 --weights IMAGENET1K_V9",
        "predict a.png --model resnet18 --weights nowhere.pth",
        "predict a.png --model resnet18 --weights text.pth",
        "predict a.png --model seresnet50",
        f"predict a.png {DIGITS} --weights https://example.com/a.pth",
        f"predict a.png {DIGITS} --categories names.txt",
        f"predict a.png {DIGITS} --categories nowhere.txt",
        f"predict a.png {DIGITS} --dtype int7",
        f"predict a.png {DIGITS} --dtype int8",
        f"predict a.png {DIGITS} --device gpu",
        f"predict a.png {DIGITS} --device cuda:77",
        f"predict a.png {DIGITS} --top-k 0",
        f"classify empty -o a.csv {DIGITS}",
        f"classify a.png -o a.xyz {DIGITS}",
        f"classify a.png -o a.csv {DIGITS} --batch-size 0",
        f"classify a.png -o a.csv {DIGITS} --top-k 0",
        f"classify a.png -o a.csv {DIGITS} --workers -1",
        f"classify a.png -o a.csv {DIGITS} --categories names.txt",
        "classify a.png -o a.csv --model resnet20",
        "inspect resnet50",
        "inspect text.pth",
        "inspect some/folder",
        "export resnet5 a.onnx",
        "export resnet20 a.onnx",
        "export resnet20_digits a.onnx --dtype int7",
        "export resnet20_digits a.onnx --categories names.txt",
        "quantize resnet20_digits empty -o q.safetensors",
        "quantize resnet20_digits a.png -o q.bin",
        "quantize resnet2 a.png -o q.safetensors",
        f"evaluate empty {DIGITS} -o ev",
        "evaluate a.png --model resnet2 -o ev",
        f"evaluate a.png {DIGITS} --engine nothing -o ev",
        f"look a.png {DIGITS} -o a.xyz",
        f"look a.png {DIGITS} -o a.png --top-k 0",
        "serve resnet5",
        "serve resnet20_digits --port 99999",
        "serve resnet20_digits --categories names.txt",
        "bench --model resnet5",
        "bench --model resnet18 --dtype int7",
        "list vgg*",
    ],
)  # fmt: skip
def test_errors_of_commands(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command.split()
    if arguments[0] == "bench":
        assert bench(arguments[1:], "fastres bench") == 2
    else:
        assert main(arguments) in (1, 2)
    said = capsys.readouterr().err
    assert "fastres" in said
    assert not OF_PYTHON.search(said), said
