"""``fastres evaluate``: options, output and exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastres
from fastres.bench.digits.data import as_image, load_digits, load_scans, split
from fastres.commands import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three held-out scans of each digit."""
    place = tmp_path_factory.mktemp("digits")
    scans, _ = load_scans()
    labels = load_digits()[1]
    for digit in range(10):
        (place / str(digit)).mkdir()
        numbers = [number for number in split(labels)[1].tolist() if int(labels[number]) == digit]
        for number in numbers[:3]:
            as_image(scans[number]).save(place / str(digit) / f"{number}.png")
    return place


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastres.evaluation.speed.SECONDS", 0.0)
    monkeypatch.setattr("fastres.evaluation.speed.TURN_SECONDS", 0.001)


def run(*arguments: object) -> int:
    return cli.main(["evaluate", *map(str, arguments), "--workers", "0", "--quiet"])


def test_text_and_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--model", "resnet20_digits", "-o", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert out.startswith("30 images\n10 folders, named as the model's classes.\n")
    assert "resnet20_digits float32  " in out
    assert out.rstrip().endswith(f"report: {tmp_path / 'out' / 'report.html'}")


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several models, dtypes and engines; what cannot run here is named."""
    options = ("--model", "resnet20_digits", "--dtype", "float32", "float16", "--engine", "fastres", "openvino")
    assert run(folder, *options, "--against", "float32", "--labels", "folders", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    names = [model["name"] for model in document["models"]]
    assert names[:2] == ["resnet20_digits float32", "resnet20_digits float32 (openvino)"]
    assert "resnet20_digits float16 (openvino)" in [entry["name"] for entry in document["left_out"]]
    assert document["reference"] == names[0]
    assert document["models"][1]["agreement"]["same_class"] == 1
    assert document["models"][1]["accuracy"]["images"] == 30


def test_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An exported file beside the model that it was made from, with labels from a file."""
    pytest.importorskip("onnxruntime")
    from fastres.export.onnx import export

    onnx = export("resnet20_digits", tmp_path / "digits.onnx", verify=False, progress=False).path
    labels = tmp_path / "labels.csv"
    paths = sorted(folder.rglob("*.png"))
    labels.write_text("".join(f"{path.parent.name}/{path.name},{path.parent.name}\n" for path in paths))
    assert run(folder, "--model", "resnet20_digits", onnx, "--labels", labels, "--json") == 0
    first, second = json.loads(capsys.readouterr().out)["models"]
    assert second["name"] == "digits.onnx"
    assert first["accuracy"]["top1"] == second["accuracy"]["top1"]


def test_8_bit_with_other_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--dtype", "int8", "--calibrate-on", folder / "1", folder / "2", folder / "7")
    assert run(folder, "--model", "resnet20_digits", *options, "--json") == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert (model["name"], model["dtype"]) == ("resnet20_digits int8", "int8")


def test_errors(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--model", "resnet21_digits") == 2
    assert "resnet20_digits" in capsys.readouterr().err
    assert run(folder, "--model", tmp_path / "missing.onnx", "resnet20_digits") == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "broken" / "0").mkdir(parents=True)
    (tmp_path / "broken" / "0" / "x.png").write_bytes(b"")
    assert run(tmp_path / "broken", "--model", "resnet20_digits") == 1, "no image could be read"
    assert "0 images, and 1 that could not be read" in capsys.readouterr().out


def test_the_function_is_public() -> None:
    assert fastres.evaluate.__module__ == "fastres.evaluation"
    assert "evaluate" in fastres.__all__
