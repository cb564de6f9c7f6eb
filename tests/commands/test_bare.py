"""Each command in an installation without any extra: it works, or says in one line what it needs."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from fastres.bench.digits.data import as_image, load_scans

# All that the extras bring and torch does not.
OPTIONAL = """
    aiohttp duckdb gcsfs huggingface_hub jax litserve matplotlib onnx onnxruntime openvino pandas prometheus_client
    pyarrow python_multipart ray rich s3fs simplejpeg skimage sklearn timm torchvision transformers triton
"""
# Runs each command in turn, as main() does, and prints the exit status and what was said.
PROGRAM = """
import contextlib, io, json, sys
sys.modules.update(dict.fromkeys(sys.argv[1].split()))
from fastres.commands.cli import main
for command in sys.argv[2:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(command.split())
    print(json.dumps([command, status, out.getvalue(), err.getvalue()]))
"""
DIGITS = "--model resnet20_digits"
EXACT = f"{DIGITS} --decoder exact"
WORK = [
    "list",
    "env",
    "completion zsh",
    f"predict a.png {DIGITS}",
    f"predict a.png {DIGITS} --csv",
    "export resnet20_digits --torch a.pt2",
    f"classify a.png -o a.csv {EXACT}",
    f"classify digits -o folder.jsonl --embed --resume {EXACT}",
    f"classify digits/*.png -o glob.csv --workers 1 {EXACT}",
    f"classify digits.tar -o tar.csv {EXACT}",
    f"classify digits -o shard.csv --shard 1/1 {EXACT}",
    "classify --join shard.csv",
    "quantize resnet20_digits digits -o q.safetensors",
]
NEED = {
    f"classify a.png -o b.csv {DIGITS}": "needs simplejpeg, which is not installed",
    f"classify a.png -o b.parquet {EXACT}": "Parquet output needs packages that are not installed (pyarrow)",
    f"classify a.parquet -o b.csv {EXACT}": "Reading Parquet files needs packages that are not installed (pyarrow)",
    f"classify a.png -o b.csv --html b.html {EXACT}": "A page of results needs packages that are not installed",
    "classify --join b.parquet": "Parquet output needs packages that are not installed (pyarrow)",
    f"evaluate a.png {DIGITS} -o ev": "evaluate needs packages that are not installed (pyarrow)",
    "quantize resnet20_digits a.parquet -o r.safetensors": "Reading Parquet files needs packages that are not",
    "serve resnet20_digits": "serve needs packages that are not installed (pyarrow and litserve and aiohttp",
    f"look a.png {DIGITS} -o l.png": "Figures need matplotlib",
    "export resnet20_digits a.onnx": "onnx is needed here but is not installed",
    "bench": "not installed: rich",
    "bench serve": "bench serve needs packages that are not installed (pyarrow and aiohttp)",
    "photographs": "photographs needs packages that are not installed (scikit-image and scikit-learn and matplotlib)",
    "demo": "The demo needs packages that are not installed (scikit-learn and matplotlib)",
    "predict a.png --model some/repository": "install huggingface_hub: pip install",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("bare")
    scans = load_scans()[0]
    as_image(scans[0]).save(folder / "a.png")
    (folder / "a.parquet").write_bytes(b"")
    (folder / "digits").mkdir()
    for number in range(12):
        as_image(scans[number]).save(folder / f"digits/{number}.png")
    with tarfile.open(folder / "digits.tar", "w") as tar:
        tar.add(folder / "digits", "digits")
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, tuple[int, str, str]]:
    arguments = [sys.executable, "-c", PROGRAM, OPTIONAL, *WORK, *NEED]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {command: (status, out, err) for command, status, out, err in rows}


@pytest.mark.parametrize("command", WORK)
def test_commands_that_need_no_extra(command: str, answers: dict[str, tuple[int, str, str]]) -> None:
    status, out, err = answers[command]
    assert status == 0, err
    assert out


@pytest.mark.parametrize("command", NEED)
def test_commands_that_say_what_they_need(command: str, answers: dict[str, tuple[int, str, str]], folder: Path) -> None:
    status, _, err = answers[command]
    assert status == 2
    assert NEED[command] in err
    assert "pip install" in err
    assert not list(folder.glob("b.*"))
