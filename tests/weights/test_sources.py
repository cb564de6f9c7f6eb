"""What ``weights=`` may name besides an entry: enum members, paths of any class, published files by path."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

import fastres
from fastres.errors import (
    CorruptCheckpointError,
    StateDictMismatchError,
    UnknownWeightsError,
    WeightsError,
)
from fastres.images.transforms import Transforms
from fastres.network.architectures import get_architecture
from fastres.weights.fitting import FreshHeadWarning
from fastres.weights.inspect import inspect
from fastres.weights.published import get_entry
from fastres.weights.state import load_state

from .state_dicts import same

RESNET20 = get_architecture("resnet20")


@pytest.mark.parametrize("name", ["ResNet18_Weights.DEFAULT", "ResNet18_Weights.IMAGENET1K_V1"])
def test_names_of_enum_members_load(cached: dict[str, Tensor], name: str) -> None:
    loaded = load_state(get_architecture("resnet18"), name)
    assert same(loaded.state, cached)
    assert loaded.entry is not None
    assert loaded.entry.name == "IMAGENET1K_V1"


def test_names_of_other_enum_members_are_refused() -> None:
    with pytest.raises(
        UnknownWeightsError, match=r"ResNet50_Weights\.DEFAULT are weights of resnet50, not of resnet18"
    ):
        load_state(get_architecture("resnet18"), "ResNet50_Weights.DEFAULT")
    with pytest.raises(UnknownWeightsError, match="resnet50 has no weights called 'IMAGENET1K_V9'"):
        load_state(get_architecture("resnet50"), "ResNet50_Weights.IMAGENET1K_V9")
    with pytest.raises(UnknownWeightsError, match=r"are weights of wide_resnet50_2, not of resnet20"):
        load_state(RESNET20, "Wide_ResNet50_2_Weights.DEFAULT")


def test_the_value_of_an_enum_member_loads(cached: dict[str, Tensor]) -> None:
    value = torchvision.models.ResNet18_Weights.DEFAULT.value
    assert same(load_state(get_architecture("resnet18"), value).state, cached)


class Failing(enum.Enum):
    """Members whose url cannot be computed."""

    A = 1

    @property
    def url(self) -> str:
        return undefined_name  # type: ignore[name-defined]  # noqa: F821

    @property
    def meta(self) -> str:
        raise AttributeError("meta")


class Numbered(enum.Enum):
    A = 1
    url = 3
    meta = 4


class Strange:
    """Nothing of it can be asked for."""

    def __repr__(self) -> str:
        raise ZeroDivisionError

    def __getattr__(self, name: str) -> object:
        raise AttributeError(name) if name.startswith("__") else KeyError(name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torchvision.models.ResNet50_Weights, r"is the class ResNet50_Weights, .*such as \w+\.IMAGENET1K_V1"),
        (Failing.A, r"is Failing\.A, an enum member without a url"),
        (Numbered.A, r"is Numbered\.A, an enum member"),
        (Failing, r"is the class Failing, .*such as Failing\.A"),
        (dict, "is the class dict;"),
        (Strange(), r"has type Strange \(its repr fails\)"),
        ([torch.zeros(2)], "has type list"),
        (iter(()), "has type tuple_iterator"),
        (np.zeros(3), "has type ndarray"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", ["resnet50", "resnet20"])
def test_odd_objects_are_named(model: str, given: Any, message: str) -> None:
    with pytest.raises(UnknownWeightsError, match=message + ".*pass 'DEFAULT'" if message[-1] != ";" else message):
        load_state(get_architecture(model), given)


class Files(str, enum.Enum):
    MINE = "mine.pth"
    BEST = "DIGITS_V1"


class Located:
    """A path of a class of its own."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def __fspath__(self) -> Any:
        if isinstance(self.path, Exception):
            raise self.path
        return self.path


def test_strings_and_paths_of_other_classes_load(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(state, "mine.pth")
    for given in (Files.MINE, Located("mine.pth"), Located(b"mine.pth")):
        loaded = load_state(RESNET20, given)
        assert same(loaded.state, state)
        assert loaded.source == "mine.pth"
    assert load_state(get_architecture("resnet20_digits"), Files.BEST).entry is not None
    for path in (ZeroDivisionError(), 3):
        with pytest.raises(WeightsError, match="a Located whose path cannot be read"):
            load_state(RESNET20, Located(path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a\0b.pth", "is not a path that can be used"),
        ("x" * 5000 + ".pth", "is not a path that can be used"),
        ("~nobody_of_this_name/a.pth", "is not a path that can be used"),
        ("https://example.com/resnet20.pth", "is a URL.*download the file"),
        (f"{__file__}/a.pth", "is not a path that can be used"),
        ("\ud800.pth", "no file|is not a path"),
    ],
)
def test_paths_that_cannot_be_are_named(given: str, message: str) -> None:
    for weights in (given, Path(given)):
        if "://" in str(weights) or "://" not in given:
            with pytest.raises(WeightsError, match=message):
                load_state(RESNET20, weights)


# Published files by their path


def test_a_published_file_by_its_path_is_its_entry(
    cached: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = get_entry("resnet18", "DEFAULT")
    file = tmp_path / "elsewhere" / entry.file
    file.parent.mkdir()
    (tmp_path / "hub" / "checkpoints" / entry.file).rename(file)
    loaded = load_state(get_architecture("resnet18"), str(file))
    assert same(loaded.state, cached)
    assert (loaded.entry, loaded.source) == (entry, str(file))
    model = fastres.load("resnet18", file)
    assert model.transforms == Transforms(resize=256, crop=224)
    assert model.categories is not None
    assert "tench" in model.categories
    with pytest.warns(FreshHeadWarning):
        assert fastres.load("resnet18", file, num_classes=4).categories is None
    monkeypatch.chdir(file.parent)
    assert load_state(get_architecture("resnet18"), entry.file).entry == entry
    with pytest.raises(StateDictMismatchError, match="those of 'resnet18'"):
        load_state(get_architecture("resnet50"), file)
    renamed = file.rename(tmp_path / "mine.pth")
    assert load_state(get_architecture("resnet18"), renamed).entry is None
    content = bytearray(renamed.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"is not the published resnet18.*rename it if it holds"):
        load_state(get_architecture("resnet18"), file)
    assert "is not the published resnet18" in str(inspect(file).reason)


def test_the_bundled_file_by_its_path_is_its_entry() -> None:
    path = Path(fastres.__file__).parent / "data" / "resnet20_digits.safetensors"
    model = fastres.load("resnet20_digits", path)
    assert model.transforms == fastres.load("resnet20_digits").transforms
    assert model.categories == tuple("0123456789")
