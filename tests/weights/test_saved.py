"""``model.save`` and ``fastres.load`` of the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fastres
from fastres.errors import (
    CorruptCheckpointError,
    DtypeError,
    FastresError,
    InputError,
    OutputError,
    StateDictMismatchError,
    UnknownModelError,
    WeightsError,
)
from fastres.images.transforms import Transforms
from fastres.model.quantized import QuantizedModel
from tests.model.test_quantized import images, model


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    one = model()
    one.categories = [f"name {index}" for index in range(1000)]
    return one.save(tmp_path / "eight.safetensors")


def test_a_model_in_8_bit_survives(eight: Path) -> None:
    expected = model()(images())
    for given in (eight, str(eight)):
        found = fastres.load(given)
        assert isinstance(found, QuantizedModel)
        assert torch.equal(found(images()), expected)
        assert found.record == {"images": 3}
        assert found.categories is not None
        assert found.categories[7] == "name 7"
        assert found.transforms == Transforms(72, 64)
    assert torch.equal(fastres.load("resnet18", eight)(images()), expected)
    assert fastres.load(eight, dtype="int8").weights == str(eight)
    assert os.path.getsize(eight) < 1.1 * sum(t.nbytes for t in model().state_dict().values())


def test_a_float_model_survives(tmp_path: Path) -> None:
    digits = fastres.load("resnet20_digits")
    path = digits.save(tmp_path / "digits.safetensors")
    found = fastres.load(path)
    x = images()[:, :, :32, :32]
    assert type(found) is fastres.Model
    assert torch.equal(found(x), digits(x))
    assert found.categories == digits.categories
    assert found.transforms == digits.transforms
    assert torch.equal(fastres.load("resnet20_digits", path)(x), digits(x)), "it is a checkpoint as well"
    with pytest.warns(UserWarning, match="random"):
        assert fastres.load(path, num_classes=3)(x).shape == (3, 3)


def test_the_file_belongs_to_the_model_once_it_is_read(eight: Path) -> None:
    found = fastres.load(eight)
    eight.write_bytes(b"\0" * eight.stat().st_size)
    assert torch.equal(found(images()), model()(images()))


@pytest.mark.parametrize(
    ("name", "arguments", "error", "words"),
    [
        ("resnet50", {}, StateDictMismatchError, "holds resnet18, not resnet50"),
        (None, {"weights": None}, WeightsError, "its own weights"),
        (None, {"weights": "DEFAULT", "num_classes": 3}, InputError, "1000 classes"),
        (None, {"dtype": "float32"}, DtypeError, "in 8 bit"),
        (None, {"categories": ["a"]}, InputError, "1000"),
    ],
)
def test_arguments_that_do_not_fit(
    eight: Path, name: str | None, arguments: dict[str, Any], error: type[FastresError], words: str
) -> None:
    with pytest.raises(error, match=words):
        fastres.load(eight, **arguments) if name is None else fastres.load(name, eight, **arguments)


def test_a_name_that_is_no_such_file(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1, dtype=torch.float32, device="cpu")}, other)
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    for path in (other, pipe, tmp_path / "absent.safetensors"):
        with pytest.raises(UnknownModelError):
            fastres.load(str(path))


@pytest.mark.parametrize("keep", [0.2, 0.9, 0.999])
def test_a_cut_file_is_named(eight: Path, keep: float) -> None:
    content = eight.read_bytes()
    eight.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CorruptCheckpointError, match=r"eight\.safetensors"):
        fastres.load(eight)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", json.dumps({"name": "resnet18", "newer": 1})),
        ("architecture", json.dumps({"name": "x", "block": "basic", "depths": [10**9]})),
        ("architecture", "[]"),
        ("transforms", json.dumps({"resize": "x", "crop": 2})),
        ("categories", "{"),
        ("record", None),
    ],
)
def test_a_description_that_cannot_be_read(eight: Path, key: str, value: str | None) -> None:
    with safe_open(eight, "pt") as file:
        metadata = {**file.metadata(), key: value}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, eight, {key: text for key, text in metadata.items() if text is not None})
    with pytest.raises(FastresError):
        fastres.load(eight)


def test_nothing_is_half_written(eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = eight.read_bytes()

    def fails(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastres.weights.saved.save_file", fails)
    with pytest.raises(OutputError, match="No space left"):
        model().save(eight)
    assert eight.read_bytes() == before
    assert os.listdir(tmp_path) == [eight.name]
    for path in (tmp_path, tmp_path / "absent" / "m.safetensors", "a\0b"):
        with pytest.raises(OutputError):
            model().save(path)
