"""``fastres quantize``: the report, the file, and outputs that are refused before the work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastres
from fastres.bench.digits.data import as_image, load_scans
from fastres.commands.cli import main
from fastres.errors import CalibrationWarning

pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    scans, digits = load_scans()
    for number in range(24):
        place = folder / str(digits[number])
        place.mkdir(exist_ok=True)
        as_image(scans[number]).save(place / f"{number}.png")
    (folder / "5" / "broken.png").write_bytes(b"no image")
    return folder


def quantize(*arguments: object) -> int:
    return main(["quantize", "resnet20_digits", *map(str, arguments), "--method", "max", "--workers", "0", "--quiet"])


def test_the_report_and_the_file(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "digits.int8.safetensors"
    with pytest.warns(CalibrationWarning, match=r"1 of 25 calibration images could not be read.*broken\.png"):
        assert quantize(images, "-o", output, "--labels-from-folders", "--keep", "stem") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{output}: ")
    assert "calibrated on 24 of 25 images; 1 could not be read" in printed
    assert "1 step is in float32: stem" in printed
    assert "accuracy on these images: 100.00% in float32" in printed
    model = fastres.load(output)
    assert model.record["kept"] == ["stem"]  # type: ignore[attr-defined]
    assert model.predict(images / "3" / "3.png").top1.label == "3"


def test_json_is_the_record(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a.safetensors"
    output.write_bytes(b"old")
    labels = tmp_path / "labels.csv"
    labels.write_text("".join(f"{path.name},{path.parent.name}\n" for path in images.rglob("*.png")))
    with pytest.warns(CalibrationWarning):
        assert quantize(images, "-o", output, "--json", "--labels", labels, "--overwrite") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["output"] == str(output)
    assert document["images"]["skipped"] == 1
    assert document["accuracy"]["int8"] == 1
    assert output.stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.onnx", [], "does not end in .safetensors"),
        ("nowhere/a.safetensors", [], "does not exist"),
        ("old.safetensors", [], "exists; use --overwrite"),
        ("labels.safetensors", ["--labels", "{folder}/labels.safetensors", "--overwrite"], "is the input"),
        ("a.safetensors", ["--labels", "{folder}/labels.safetensors"], "There is 1 label for|'x' (labels|'x' ('"),
        ("a.safetensors", ["--labels-from-folders", "--labels-order", "x"], "--labels-order is 'x'; give 'auto'"),
        ("a.safetensors", ["--samples", "3"], "samples is 3"),
        ("a.safetensors", ["--keep", "layer9"], "keep names 'layer9'"),
        ("a.safetensors", ["--largest-error", "1e-9"], "largest_error is 0.0%"),
    ],
)
def test_nothing_is_written_if_something_is_wrong(
    name: str,
    options: list[str],
    message: str,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file in ("old", "labels"):
        (tmp_path / f"{file}.safetensors").write_text("x\n")
    before = sorted(tmp_path.rglob("*"))
    given = [option.format(folder=tmp_path) for option in options]
    assert quantize(images, "-o", tmp_path / name, *given) == 2
    printed, messages = capsys.readouterr()
    assert printed == ""
    assert any(part in messages for part in message.split("|"))
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "old.safetensors").read_text() == "x\n"
