"""The table of published weights, and the bundled model."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torchvision

import fastres
from fastres.errors import CorruptCheckpointError, UnknownModelError, UnknownWeightsError, WeightsError
from fastres.network.architectures import get_architecture
from fastres.network.catalogue import list_models
from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD
from fastres.weights import published
from fastres.weights.published import entries, get_entry
from fastres.weights.state import load_state
from tests.network.test_architectures import TORCHVISION

from .state_dicts import same

DATA = Path(fastres.__file__).parent / "data"
BUNDLED_FILES = ("resnet20_digits.safetensors", "resnet20_digits.json")


@pytest.mark.parametrize("model", TORCHVISION)
def test_the_table_is_torchvisions(model: str) -> None:
    enum = torchvision.models.get_model_weights(model)
    table = entries(model)
    assert list(table) == [member.name for member in enum]
    for member in enum:
        entry, meta = table[member.name], member.meta
        metrics = meta["_metrics"]["ImageNet-1K"]
        assert entry.file == member.url.rpartition("/")[2]
        assert entry.url == member.url
        assert entry.file == f"{model}-{entry.sha256}.pth"
        assert len(bytes.fromhex(entry.sha256)) == 4
        assert (entry.acc1, entry.acc5) == (metrics["acc@1"], metrics["acc@5"])
        assert (entry.params, entry.gmacs, entry.file_mb) == (meta["num_params"], meta["_ops"], meta["_file_size"])
        preset = member.transforms()
        assert ([entry.resize], [entry.crop]) == (preset.resize_size, preset.crop_size)
        assert (list(entry.mean), list(entry.std)) == (preset.mean, preset.std)
        assert preset.interpolation.value == "bilinear"
        assert entry.default == (member is enum.DEFAULT)
        assert (entry.model, entry.name, entry.bundled, entry.categories) == (model, member.name, False, "imagenet")
    assert get_entry(model, "DEFAULT") == table[enum.DEFAULT.name]


def test_models_without_published_weights_have_no_entries() -> None:
    assert {model for model in list_models() if entries(model)} == {*TORCHVISION, "resnet20_digits"}


def test_parameters_and_multiply_accumulates_are_counted_as_torchvision_counts_them() -> None:
    for model in TORCHVISION:
        entry = get_entry(model, "DEFAULT")
        assert published._parameters(get_architecture(model)) == entry.params
        assert published._macs(get_architecture(model), 224) / 1e9 == pytest.approx(entry.gmacs, abs=6e-4)


def test_half_of_each_file_is_missing_where_weights_are_stored_in_half_precision() -> None:
    stored_bytes = {
        (model, entry.name): entry.file_mb * 2**20 / entry.params
        for model in TORCHVISION
        for entry in entries(model).values()
    }
    half = {key for key, size in stored_bytes.items() if size < 3}
    assert half == {("wide_resnet50_2", "IMAGENET1K_V1"), ("wide_resnet101_2", "IMAGENET1K_V1")}


def test_changing_a_returned_table_changes_no_other() -> None:
    entries("resnet18").clear()
    assert entries("resnet18")


def test_unknown_models_and_entries_are_named() -> None:
    with pytest.raises(UnknownModelError, match="resnet19"):
        entries("resnet19")
    with pytest.raises(
        UnknownWeightsError, match=r"resnet50 has no weights called 'IMAGENET1K_V3'\. Did you mean"
    ) as e:
        get_entry("resnet50", "IMAGENET1K_V3")
    assert "'IMAGENET1K_V1', 'IMAGENET1K_V2' and 'DEFAULT'" in str(e.value)
    with pytest.raises(UnknownWeightsError, match=r"Did you mean 'DEFAULT'"):
        get_entry("resnet50", "default")
    with pytest.raises(UnknownWeightsError, match=r"resnet20 has no published weights.*weights=None.*path.*state dict"):
        get_entry("resnet20", "DEFAULT")


def test_url_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRES_WEIGHTS_URL", "https://mirror.example/weights")
    assert get_entry("resnet18", "DEFAULT").url == "https://mirror.example/weights/resnet18-f37072fd.pth"
    assert get_entry("resnet20_digits", "DEFAULT").url is None


# The bundled model


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's data folder that tests may change."""
    folder = tmp_path / "data"
    shutil.copytree(DATA, folder)
    monkeypatch.setattr(published, "_data_folder", lambda: folder)
    return folder


def test_the_model_in_the_box_is_as_its_record_says() -> None:
    record = json.loads((DATA / "resnet20_digits.json").read_text())
    entry = get_entry("resnet20_digits", "DEFAULT")
    assert entry == entries("resnet20_digits")["DIGITS_V1"]
    assert entry.sha256 == record["sha256"] == hashlib.sha256((DATA / entry.file).read_bytes()).hexdigest()
    assert entry.acc1 == pytest.approx(100 * record["held_out_accuracy"], abs=1e-3)
    assert 90 < entry.acc1 <= 100
    assert (entry.mean, entry.std) == (tuple(record["mean"]), tuple(record["std"]))
    assert (entry.mean, entry.std) != (IMAGENET_MEAN, IMAGENET_STD)
    assert (entry.resize, entry.crop, entry.categories, entry.bundled) == (32, 32, "digits", True)
    assert entry.params == sum(
        value.numel()
        for key, value in safetensors.torch.load_file(DATA / entry.file).items()
        if "running" not in key and "num_batches" not in key
    )
    assert entry.gmacs == 0.041  # 40.55 million: He et al.'s network at 32 × 32


def test_the_model_in_the_box_loads() -> None:
    loaded = load_state(get_architecture("resnet20_digits"), "DEFAULT")
    stored = safetensors.torch.load_file(DATA / "resnet20_digits.safetensors")
    assert loaded.entry == get_entry("resnet20_digits", "DIGITS_V1")
    assert same(loaded.state, {key: stored[key] for key in loaded.state})
    assert loaded.arch.num_classes == 10
    assert loaded.missing_head is False


@pytest.mark.parametrize("file", BUNDLED_FILES)
def test_a_missing_packaged_file_is_named(box: Path, file: str) -> None:
    (box / file).unlink()
    with pytest.raises(WeightsError, match=rf"{file} is missing from the installed package.*Install fastres again"):
        load_state(get_architecture("resnet20_digits"), "DEFAULT")


def test_an_altered_packaged_file_is_corrupt(box: Path) -> None:
    path = box / "resnet20_digits.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"resnet20_digits\.safetensors in the installed package"):
        load_state(get_architecture("resnet20_digits"), "DIGITS_V1")
