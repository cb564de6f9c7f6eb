"""``fastres export`` on the command line."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastres.bench.digits.data import as_image, load_scans
from fastres.errors import FastresError, InputError
from fastres.export.command import add_arguments, run

onnx = pytest.importorskip("onnx")

from fastres.export import timing  # noqa: E402
from fastres.extras import install  # noqa: E402

from .quantised import known  # noqa: E402


def command(*words: object) -> int:
    parser = argparse.ArgumentParser("fastres export")
    add_arguments(parser)
    return run(parser.parse_args([*map(str, words), "--quiet"]))


def test_export_then_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "digits.onnx"
    assert command("resnet20_digits", path) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{path}: ")
    assert text.count("verified against fastres, batch") == 3
    assert command("--inspect", path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "weights  DIGITS_V1" in lines
    assert "input  input  float32 [batch, 3, 32, 32]" in lines
    assert command("--inspect", path, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["inputs"] == {"input": {"dtype": "float32", "shape": ["batch", 3, 32, 32]}}
    assert data["model"] == "resnet20_digits"


def test_options_reach_the_exporter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    words = ["--weights", "none", "--num-classes", 4, "--opset", 17, "--dtype", "float16", "--image-size", 24, 40]
    words += ["--batch", 2, "--outputs", "logits", "top_k", "--top-k", 3, "--json"]
    assert command("plain20", path, *words) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["opset"], data["dtype"], data["input"]) == (17, "float16", [2, 3, 24, 40])
    assert data["outputs"] == ["logits", "top_k_scores", "top_k_indices"]
    assert [check["batch"] for check in data["checks"]] == [2]
    command("resnet20_digits", path, "--preprocessing", "--no-verify", "--json")
    data = json.loads(capsys.readouterr().out)
    assert (data["input"], data["checks"]) == (["batch", "height", "width", 3], [])


def test_other_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("resnet20_digits", "--torch", tmp_path / "m.pt2", "--image-size", "dynamic") == 0
    assert command("resnet20_digits", "--server-repository", tmp_path / "models", "--max-batch-size", 4) == 0
    images = tmp_path / "images"
    images.mkdir()
    for index, scan in enumerate(load_scans()[0][:12]):
        as_image(scan).save(images / f"{index}.png")
    words = ["--int8", "--calibration", images, "--least-agreement", 0.5]
    assert command("resnet20_digits", tmp_path / "int8.onnx", *words) == 0
    assert "calibrated on 9 images; against float32, on 3 others: same best class" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["images", "int8.onnx", "m.pt2", "models"]
    assert "max_batch_size: 4" in (tmp_path / "models" / "resnet20_digits" / "config.pbtxt").read_text()


def test_a_saved_model_in_8_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0)
    file = known("resnet20_digits", limit=127).model.save(tmp_path / "m.safetensors")
    assert command(file, tmp_path / "m.onnx", "--batch", 2, "--time", "--weight-limit", 64, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["dtype"] == "int8"
    assert max(data["checks"][0]["levels"].values()) == 1
    for row in data["times"]:
        assert (row["batch"], row["speedup"]) == (2, row["float32_milliseconds"] / row["milliseconds"])
    command("--inspect", tmp_path / "m.onnx", "--json")
    assert json.loads(json.loads(capsys.readouterr().out)["quantisation"])["largest_weight"] == 64


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Nothing was given"),
        (["resnet20_digits"], "Nothing was given"),
        (["resnet20_digits", "a.onnx", "--torch", "b.pt2"], "a path and --torch"),
        (["--torch", "b.pt2"], "No model"),
        (["resnet20_digits", "a.onnx", "--int8"], "--calibration DIR"),
        (["resnet20_digits", "a.onnx", "--time"], "in float32"),
        (["resnet20_digits", "--torch", "b.pt2", "--time"], "--time cannot"),
        (["resnet20_digits", "a.onnx", "--calibration", "x"], "add --int8"),
        (["resnet20_digits", "--torch", "b.pt2", "--int8", "--calibration", "x"], "give its path"),
        (["resnet20_digits", "a.onnx", "--int8", "--calibration", "x", "--dtype", "float16"], "--dtype cannot"),
        (["resnet20_digits", "--torch", "b.pt2", "--preprocessing"], "--preprocessing cannot"),
        (["resnet20_digits", "--server-repository", "d", "--batch", "3"], "--batch cannot"),
        (["resnet20_digits", "a.onnx", "--image-size", "large"], "image_size"),
        (["resnet20_digits", "a.onnx", "--image-size", "1", "2", "3"], "image_size"),
        (["resnet20_digits", "a.onnx", "--batch", "-1"], "batch"),
        (["resnet20_digits", "a.onnx", "--opset", "7"], "opset"),
    ],
)
def test_mistakes_are_named(words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        command(*words)
    assert os.listdir(tmp_path) == []


def test_every_mistake_is_a_fastres_error(tmp_path: Path) -> None:
    for words in (
        ["resnet999", tmp_path / "a.onnx"],
        ["resnet18", tmp_path / "no" / "a.onnx"],
        ["--inspect", tmp_path],
    ):
        with pytest.raises(FastresError):
            command(*words)


def test_arguments_are_shown_without_onnx() -> None:
    code = (
        "import sys, argparse\n"
        "sys.modules['onnx'] = sys.modules['onnxruntime'] = None\n"
        "from fastres.errors import MissingDependencyError\n"
        "from fastres.export.command import add_arguments, run\n"
        "parser = argparse.ArgumentParser()\nadd_arguments(parser)\nparser.format_help()\n"
        "try:\n    run(parser.parse_args(['resnet20_digits', 'never.onnx']))\n"
        "except MissingDependencyError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert install("onnx") in done.stdout
