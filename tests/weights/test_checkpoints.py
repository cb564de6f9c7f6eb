"""Checkpoint files: good, damaged and dangerous ones."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path, PurePosixPath

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastres.bench.engines.eager import EagerResNet
from fastres.errors import CorruptCheckpointError, UnsafeCheckpointError, WeightsError
from fastres.network.architectures import get_architecture
from fastres.weights.checkpoints import is_path_like, read_checkpoint
from fastres.weights.layouts import unwrap

from .state_dicts import distinct_state, same

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return distinct_state("resnet20")


class Exploit:
    """If a careless reader unpickles this, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (self.folder,))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".PTH", ""])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read(state: dict[str, Tensor], tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save({"state_dict": state, "epoch": 4}, path, _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(path)
    assert isinstance(checkpoint, dict)
    assert checkpoint["epoch"] == 4
    assert same(checkpoint["state_dict"], state)


def test_safetensors_files_are_read(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(state, path)
    checkpoint = read_checkpoint(path)
    assert isinstance(checkpoint, dict)
    assert same({key: checkpoint[key] for key in state}, state)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no file .*nowhere\.pth.*\.safetensors"):
        read_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(WeightsError, match="is not a file"):
        read_checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.pth"
    path.touch(mode=0)
    with pytest.raises(WeightsError, match=r"secret\.pth cannot be read"):
        read_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.3, 0.999])
def test_truncated_torch_files_are_corrupt(
    state: dict[str, Tensor], tmp_path: Path, zipped: bool, share: float
) -> None:
    path = tmp_path / "half.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CorruptCheckpointError, match=rf"half\.pth \({path.stat().st_size:,} bytes\) is not a complete"):
        read_checkpoint(path)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.5, 0.999])
def test_truncated_safetensors_files_are_corrupt(state: dict[str, Tensor], tmp_path: Path, share: float) -> None:
    path = tmp_path / "half.safetensors"
    content = safetensors.torch.save(state)
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CorruptCheckpointError, match=r"half\.safetensors .* is not a complete safetensors file"):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n", b'{"a": 1}', b"hello world"]
)
def test_files_of_another_kind_are_corrupt(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"page{suffix}"
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="page") as raised:
        read_checkpoint(path)
    if suffix == ".pth":
        assert f"begins with {content[:16]!r}" in str(raised.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), beginning=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"c"]))
def test_garbage_raises_a_named_error(tmp_path: Path, content: bytes, beginning: bytes) -> None:
    path = tmp_path / "garbage.pth"
    path.write_bytes(beginning + content)
    with pytest.raises((CorruptCheckpointError, UnsafeCheckpointError), match=r"garbage\.pth"):
        read_checkpoint(path)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, form: str, protocol: int) -> None:
    path, folder = tmp_path / "evil.pth", tmp_path / "made"
    checkpoint = {"conv1.weight": Exploit(folder)}
    if form == "zip":
        torch.save(checkpoint, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(checkpoint, protocol))
    with pytest.raises(UnsafeCheckpointError, match=r"evil\.pth .* uses (posix|nt)\.mkdir.*state_dict\(\)"):
        read_checkpoint(path)
    assert not folder.exists()
    pickle.loads(pickle.dumps(checkpoint, protocol))
    assert folder.exists(), "the test's exploit does nothing"


@pytest.mark.parametrize("protocol", [0, 1])
def test_code_in_a_text_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    path, folder = tmp_path / "evil.pth", tmp_path / "made"
    path.write_bytes(pickle.dumps(Exploit(folder), protocol))
    with pytest.raises(UnsafeCheckpointError, match=r"uses (posix|nt)\.mkdir"):
        read_checkpoint(path)
    assert not folder.exists()


@pytest.mark.parametrize("protocol", [2, 5])
def test_code_in_an_old_torch_file_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    path, folder = tmp_path / "evil.pth", tmp_path / "made"
    torch.save([Exploit(folder)], path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeCheckpointError, match=r"evil\.pth .*only the weights"):
        read_checkpoint(path)
    assert not folder.exists()


def test_a_whole_pickled_module_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "module.pth"
    torch.save(EagerResNet(get_architecture("resnet20")), path)
    with pytest.raises(
        UnsafeCheckpointError, match=r"whole pickled nn\.Module, not a state dict.*EagerResNet.*model\.state_dict\(\)"
    ):
        read_checkpoint(path)


def test_objects_beside_the_weights_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "training.pth"
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1)}, path)
    assert same(unwrap(read_checkpoint(path)), state)
    torch.save({"model": state, "args": argparse.Namespace(data=PurePosixPath("images"))}, path)
    with pytest.raises(UnsafeCheckpointError, match=r"training\.pth .*uses pathlib\.PurePosixPath"):
        read_checkpoint(path)


def test_a_harmless_pickle_of_a_newer_protocol_is_refused_with_advice(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "protocol5.pth"
    torch.save(state, path, pickle_protocol=5)
    with pytest.raises(UnsafeCheckpointError, match=r"protocol 3 or above.*torch\.save"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))
    with pytest.raises(UnsafeCheckpointError, match=r"TorchScript.*torch\.jit\.load\(path\)\.state_dict\(\)"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("IMAGENET1K_V1", False),
        ("DEFAULT", False),
        ("weights.pth", True),
        ("weights.SAFETENSORS", True),
        ("runs/last", True),
        ("./DEFAULT", True),
        ("last.ckpt", True),
        ("resnet50.a1_in1k", False),
    ],
)
def test_which_strings_are_paths(text: str, expected: bool) -> None:
    assert is_path_like(text) is expected
