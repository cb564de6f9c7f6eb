"""Every form of weights that ``load_state`` takes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

import fastres
from fastres.errors import (
    ArchitectureError,
    CorruptCheckpointError,
    StateDictMismatchError,
    UnknownWeightsError,
    UnsafeCheckpointError,
    WeightsError,
)
from fastres.network.architectures import Architecture, get_architecture
from fastres.weights.checkpoints import MisnamedFileWarning
from fastres.weights.fitting import FreshHeadWarning
from fastres.weights.published import WeightsEntry, get_entry
from fastres.weights.state import LoadedWeights, load_state

from .state_dicts import distinct_state, same

RESNET20 = get_architecture("resnet20")


# Files


def as_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.half() if value.is_floating_point() else value for key, value in state.items()}


WRITERS: dict[str, Callable[[Any, Path], None]] = {".pth": torch.save, ".safetensors": safetensors.torch.save_file}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("as_string", [True, False])
def test_files_load(state: dict[str, Tensor], tmp_path: Path, suffix: str, as_string: bool) -> None:
    path = tmp_path / f"weights{suffix}"
    WRITERS[suffix](state, path)
    loaded = load_state(RESNET20, str(path) if as_string else path)
    assert same(loaded.state, state)
    assert (loaded.entry, loaded.source, loaded.arch) == (None, str(path), RESNET20)


@pytest.mark.parametrize("suffix", WRITERS)
def test_half_precision_files_become_float32(state: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"half{suffix}"
    WRITERS[suffix](as_half(state), path)
    expected = {key: value.float() if value.ndim else value for key, value in as_half(state).items()}
    assert same(load_state(RESNET20, path).state, expected)


@pytest.mark.parametrize("suffix", WRITERS)
def test_loaded_weights_outlive_their_file(state: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    WRITERS[suffix](state, path)
    loaded = load_state(RESNET20, path)
    with open(path, "r+b") as stream:  # in place: the same file, other bytes
        stream.write(bytes(path.stat().st_size))
    assert same(loaded.state, state)


def test_wrapped_prefixed_and_foreign_files_load(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "cifar.th"
    foreign = {f"module.{key.replace('fc.', 'linear.')}": value for key, value in state.items()}
    torch.save({"state_dict": foreign, "best_prec1": 92.1}, path)
    assert same(load_state(RESNET20, path).state, state)


def test_a_home_folder_is_expanded(state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(state, tmp_path / "mine.pth")
    assert same(load_state(RESNET20, "~/mine.pth").state, state)


def test_a_file_without_suffix_loads_unless_it_is_called_as_an_entry(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    digits = get_architecture("resnet20_digits")
    for name in ("checkpoint", "DEFAULT", "DIGITS_V1"):
        torch.save(state, name)
    assert same(load_state(digits, "checkpoint").state, state)
    assert (
        load_state(digits, "DIGITS_V1").entry
        == load_state(digits, "DEFAULT").entry
        == get_entry("resnet20_digits", "DIGITS_V1")
    )
    assert same(load_state(digits, "./DEFAULT").state, state)
    assert same(load_state(digits, Path("DIGITS_V1")).state, state)


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    with pytest.raises(WeightsError, match=r"no file .*bad\.pth"):
        load_state(RESNET20, path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CorruptCheckpointError, match=r"bad\.pth"):
        load_state(RESNET20, path)
    torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(UnsafeCheckpointError, match=r"bad\.pth holds a whole pickled nn\.Module"):
        load_state(RESNET20, str(path))
    torch.save(distinct_state("resnet32"), path)
    with pytest.raises(StateDictMismatchError, match=r"bad\.pth do not fit resnet20(.|\n)*'resnet32' and 'plain32'"):
        load_state(RESNET20, path)


# State dicts, None, and unsupported objects


def test_state_dicts_load_and_are_copied(state: dict[str, Tensor]) -> None:
    mine = {key: value.clone() for key, value in state.items()}
    loaded = load_state(RESNET20, {"model": mine})
    for value in mine.values():
        value.zero_()
    assert same(loaded.state, state)
    assert (loaded.entry, loaded.source) == (None, "a state dict")


def test_the_result_loads_strictly_into_torchvision() -> None:
    state = distinct_state("resnet18", num_classes=9)
    bare = {key: value for key, value in state.items() if "num_batches" not in key}
    loaded = load_state(get_architecture("resnet18"), bare)
    module = torchvision.models.resnet18(num_classes=loaded.arch.num_classes)
    module.load_state_dict(loaded.state, strict=True)
    for key, value in bare.items():
        assert torch.equal(module.state_dict()[key], value)


def test_none_is_random_and_takes_a_class_count() -> None:
    torch.manual_seed(0)
    first = load_state(RESNET20, None)
    torch.manual_seed(0)
    again = load_state(RESNET20, None, num_classes=10)
    other = load_state(RESNET20, None, num_classes=3)
    assert same(first.state, again.state)
    assert (first.entry, first.source, first.missing_head) == (None, "random initialisation", False)
    assert other.arch.num_classes == 3
    assert other.state["fc.weight"].shape == (3, 64)
    assert not torch.equal(first.state["conv1.weight"], other.state["conv1.weight"])
    with pytest.raises(ArchitectureError, match="num_classes is -1"):
        load_state(RESNET20, None, num_classes=-1)


def test_a_fresh_head_is_warned_of_at_the_callers_line(state: dict[str, Tensor]) -> None:
    def as_fastres_load_does() -> LoadedWeights:
        return load_state(RESNET20, state, num_classes=4)

    with pytest.warns(FreshHeadWarning) as warned:
        loaded = as_fastres_load_does()
    assert loaded.missing_head
    assert warned[0].filename == __file__


def test_an_architecture_that_is_not_in_the_table_loads_files_and_state_dicts(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    custom = dataclasses.replace(RESNET20, name="custom")
    assert same(load_state(custom, state).state, state)
    torch.save(state, tmp_path / "weights.pth")
    assert same(load_state(custom, str(tmp_path / "weights.pth")).state, state)


@pytest.mark.parametrize("given", [3, 2.5, [1], b"weights.pth", True, torch.zeros(2)])
def test_what_is_no_form_of_weights_is_named(given: Any) -> None:
    with pytest.raises(UnknownWeightsError, match=rf"weights has type {type(given).__name__}.*pass 'DEFAULT'"):
        load_state(RESNET20, given)


def test_a_module_is_sent_to_from_module() -> None:
    with pytest.raises(WeightsError, match="from_module"):
        load_state(RESNET20, torch.nn.Linear(1, 1))


# Entries and enum members


@pytest.mark.parametrize("named", ["DEFAULT", "IMAGENET1K_V1", "enum", "enum default"])
def test_entries_load_by_name_and_by_enum_member(cached: dict[str, Tensor], named: str) -> None:
    enum = torchvision.models.ResNet18_Weights
    given = {"enum": enum.IMAGENET1K_V1, "enum default": enum.DEFAULT}.get(named, named)
    loaded = load_state(get_architecture("resnet18"), given)
    assert same(loaded.state, cached)
    assert loaded.entry is not None
    assert (loaded.entry.model, loaded.entry.name) == ("resnet18", "IMAGENET1K_V1")
    assert loaded.source == "resnet18 IMAGENET1K_V1 (resnet18-f37072fd.pth)"
    assert loaded.arch == get_architecture("resnet18")


def test_an_entry_with_another_class_count_keeps_its_backbone(cached: dict[str, Tensor]) -> None:
    with pytest.warns(FreshHeadWarning, match="resnet18 IMAGENET1K_V1 .* a classifier of 1000 classes"):
        loaded = load_state(get_architecture("resnet18"), "DEFAULT", num_classes=5)
    assert loaded.state["fc.weight"].shape == (5, 512)
    assert torch.equal(loaded.state["layer4.1.conv2.weight"], cached["layer4.1.conv2.weight"])


def test_enum_members_of_other_models_are_refused() -> None:
    member = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
    with pytest.raises(
        UnknownWeightsError,
        match=r"ResNet50_Weights\.IMAGENET1K_V2 are weights of resnet50, not of resnet18.*'IMAGENET1K_V1'.*'resnet50'",
    ):
        load_state(get_architecture("resnet18"), member)
    with pytest.raises(UnknownWeightsError, match="resnet20 has no published weights"):
        load_state(RESNET20, member)
    other = torchvision.models.VGG11_Weights.IMAGENET1K_V1
    with pytest.raises(UnknownWeightsError, match=r"does not know the weights VGG11_Weights.*get_state_dict"):
        load_state(get_architecture("resnet18"), other)


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(UnknownWeightsError, match=r"resnet50 has no weights called 'imagenet'.*'IMAGENET1K_V2'"):
        load_state(get_architecture("resnet50"), "imagenet")


# Types and cost


def test_entries_and_results_are_frozen() -> None:
    entry = get_entry("resnet18", "DEFAULT")
    assert isinstance(entry, WeightsEntry)
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.acc1 = 100.0  # type: ignore[misc]
    loaded = load_state(RESNET20, None)
    assert isinstance(loaded.arch, Architecture)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.source = "elsewhere"  # type: ignore[misc]
    assert len(repr(loaded)) < 1000, "the repr prints tensors"


def test_importing_reads_no_table_and_imports_no_reader() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fastres.weights.published as w; "
        "assert w._torchvision_entries.cache_info().currsize == 0; "
        "print(*sorted({'safetensors', 'torchvision'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_misnamed_file_is_warned_of_at_the_callers_line(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "a.safetensors")
    with pytest.warns(MisnamedFileWarning) as warned:
        fastres.load("resnet20", tmp_path / "a.safetensors")
    assert [warning.filename for warning in warned] == [__file__]
