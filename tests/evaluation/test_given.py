"""Models, dtypes, engines and devices as users give them: what does not fit is named before an image is read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastres
from fastres.errors import DeviceError, FastresError, InputError
from fastres.evaluation import choices
from fastres.export.errors import ExportFileError

from .running import DIGITS, evaluate


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    from fastres.export.onnx import export

    return export(DIGITS, tmp_path_factory.mktemp("export") / "digits.onnx", verify=False, progress=False).path


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtypes": 3}, InputError, "dtypes is an int; give a name, or a list"),
        ({"engines": 3}, InputError, "engines is an int; give a name, or a list"),
        ({"device": "cudda"}, DeviceError, "device is 'cudda'; give 'cpu'"),
        ({"device": 1.5}, DeviceError, "device is 1.5; give 'cpu'"),
        ({"models": b"resnet18"}, InputError, "models is a bytes; pass"),
        ({"models": {"": DIGITS}}, InputError, "A model is called '' in models; give each a name"),
        ({"models": {"a\nb": DIGITS}}, InputError, r"A model is called 'a\\nb' in models"),
        ({"batch_size": 10**12}, InputError, "not enough memory for a batch of 1,000,000,000,000 images; give"),
        ({"calibrate_on": "photos"}, InputError, "calibrate_on was given, but 'int8' is not among dtypes"),
        ({"against": "missing.onnx"}, ExportFileError, "missing.onnx does not exist"),
    ],
)
def test_wrong_arguments(few: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(few, **options)


def test_a_file_is_missed_before_a_model_is_loaded(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., Any]
) -> None:
    monkeypatch.setattr(choices, "load", refused)
    with pytest.raises(ExportFileError, match=r"none\.onnx does not exist"):
        evaluate(few, [DIGITS, tmp_path / "none.onnx"])
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ExportFileError, match=r"folder\.onnx is a folder"):
        evaluate(few, [DIGITS, tmp_path / "folder.onnx"])


@pytest.fixture
def refused() -> Callable[..., Any]:
    def call(*arguments: object, **options: object) -> None:
        raise AssertionError("it was called")

    return call


def test_weights_that_no_model_takes(few: Path, tmp_path: Path, onnx_file: Path) -> None:
    """They would be left out, and another model would be measured than the user thinks."""
    saved = fastres.load(DIGITS).save(tmp_path / "saved.safetensors")
    for models in (saved, onnx_file, [saved, onnx_file]):
        with pytest.raises(InputError, match="weights were given, but every model is a file"):
            evaluate(few, models, weights=saved)
    assert len(evaluate(few, [DIGITS, onnx_file], weights=saved).models) == 2


def test_categories_are_those_of_files_too(few: Path, tmp_path: Path, onnx_file: Path) -> None:
    names = [f"digit {number}" for number in range(10)]
    result = evaluate(few, [DIGITS, onnx_file], categories=names, class_order="numbers")
    assert result.class_names == tuple(names)
    assert evaluate(few, onnx_file, categories=names, class_order="numbers").class_names == tuple(names)


def test_devices_of_files(few: Path, onnx_file: Path) -> None:
    """They never run on another device than the one that was given."""
    assert evaluate(few, onnx_file, device="cpu").models[0].engine == "onnxruntime"
    if not torch.cuda.is_available():
        with pytest.raises((DeviceError, ExportFileError), match="CUDA"):
            evaluate(few, onnx_file, device="cuda")
    pytest.importorskip("openvino")
    with pytest.raises(DeviceError, match="Exported files run on the CPU in openvino, but device is 'cuda'"):
        evaluate(few, onnx_file, device="cuda", engines="openvino")


def test_a_model_in_8_bit_is_made_once_and_not_timed(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scales take minutes for a large network."""
    pytest.importorskip("onnxruntime")
    calls = []
    usual = choices.quantize

    def slow(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        threading.Event().wait(1)
        return usual(*arguments, **options)

    monkeypatch.setattr(choices, "quantize", slow)
    result = evaluate(few, dtypes="int8", engines=["fastres", "onnxruntime"], calibrate_on=few)
    assert len(calls) == 1
    speed = result.models[0].speed
    assert speed is not None
    assert speed.first_answer_s < 1


def test_every_candidate_of_one_name_gets_its_weights(few: Path, tmp_path: Path) -> None:
    model = fastres.load(DIGITS)
    paths = [model.save(tmp_path / f"{name}.safetensors") for name in ("first", "second")]
    names = [each.name for each in evaluate(few, paths).models]
    assert names == [f"{DIGITS} float32, first.safetensors", f"{DIGITS} float32, second.safetensors"]
    names = [each.name for each in evaluate(few, [paths[0], paths[0]]).models]
    assert names == [f"{DIGITS} float32", f"{DIGITS} float32 2"]


@pytest.mark.parametrize("content", [b"junk", b"", None])
def test_files_of_others(content: bytes | None, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a library says of them is no traceback on the screen."""
    pytest.importorskip("onnxruntime")
    path = tmp_path / "other.pt2"
    if content is None:
        torch.save({"a": 1}, path)
    else:
        path.write_bytes(content)
        path.with_suffix(".onnx").write_bytes(content)
        with pytest.raises(FastresError, match="pass a file that fastres export wrote"):
            evaluate(few, path.with_suffix(".onnx"))
    with pytest.raises(ExportFileError, match=r"cannot open .*other\.pt2 \(it is no.*\); pass a file that fastres"):
        evaluate(few, path)
    assert "Traceback" not in "".join(capfd.readouterr())
