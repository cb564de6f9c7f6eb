"""Checkpoint files: good, damaged and dangerous ones."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import os
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastres.bench.engines.eager import EagerResNet
from fastres.errors import CorruptCheckpointError, UnsafeCheckpointError, WeightsError
from fastres.network.architectures import get_architecture
from fastres.weights.checkpoints import MisnamedFileWarning, is_path_like, read_checkpoint
from fastres.weights.unpickling import Inert
from fastres.weights.wrapping import unwrap

from .state_dicts import same

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")


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


class Schedule:
    """An object of a training script."""

    def __init__(self) -> None:
        self.steps = [1, 2]


class Colour(enum.Enum):
    RED = 1


def beside_the_weights() -> dict[str, Any]:
    """Objects that training scripts save with the weights."""
    history: dict[str, list[float]] = collections.defaultdict(list)
    history["loss"].append(0.5)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        "args": argparse.Namespace(lr=0.1, data=PurePosixPath("images")),
        "path": Path("images"),
        "score": np.float64(0.7),
        "seed": np.int64(3),
        "array": np.arange(4.0),
        "history": history,
        "counter": collections.Counter("aab"),
        "when": datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),
        "classes": {"cat", "dog"},
        "frozen": frozenset({1}),
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "colour": Colour.RED,
        "by colour": {Colour.RED: 1, (1, 2): 3, None: 4},
        "loss": torch.nn.MSELoss(),
        "schedule": Schedule(),
        "class": torch.nn.Linear,
        "optimizer": optimizer.state_dict(),
        "number": 1j,
        "bytes": b"ab",
        "bytearray": bytearray(b"ab"),
        "sparse": torch.eye(3).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
        "meta": torch.empty(3, device="meta"),
        "random state": np.random.RandomState(0).get_state(),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*")
def test_objects_beside_the_weights_do_no_harm(
    state: dict[str, Tensor], tmp_path: Path, zipped: bool, protocol: int
) -> None:
    path = tmp_path / "training.pth"
    content = {"epoch": 2, **beside_the_weights(), "state_dict": state}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    assert isinstance(found, dict)
    assert list(found) == list(content)
    assert same(unwrap(found), state)
    assert isinstance(found["schedule"], Inert)
    assert "Schedule" in found["schedule"].name
    assert isinstance(found["loss"], Inert)
    assert found["dtype"] is torch.float16
    assert found["history"] == {"loss": [0.5]}
    assert found["number"] == 1j
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], content["optimizer"]["state"][0]["exp_avg"])


@pytest.mark.parametrize("zipped", [True, False])
def test_every_dtype_view_and_mark_is_read(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    whole = torch.complex(base, base + 1)
    names = "float64 float32 float16 bfloat16 complex64 int64 int32 int16 int8 uint8 bool"
    tensors = {name: base.to(getattr(torch, name)) for name in names.split()}
    tensors |= {"float8": base.to(torch.float8_e4m3fn), "uint16": base.to(torch.uint16)}
    tensors |= {"transposed": base.t(), "part": base[1:3, ::2], "expanded": torch.ones(1).expand(5, 3)}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.0), "parameter": torch.nn.Parameter(base)}
    tensors |= {"conjugate": whole.conj(), "negative": torch._neg_view(torch.arange(3.0))}
    path = tmp_path / "tensors.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    assert isinstance(found, dict)
    for name, tensor in tensors.items():
        other = found[name]
        assert type(other) is Tensor
        assert (other.dtype, other.shape, other.stride()) == (tensor.dtype, tensor.shape, tensor.stride()), name
        assert (other.is_conj(), other.is_neg()) == (tensor.is_conj(), tensor.is_neg()), name
        assert other.tolist() == tensor.tolist(), name
    assert found["part"].untyped_storage().data_ptr() == found["transposed"].untyped_storage().data_ptr()


def test_a_file_of_a_big_endian_machine_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1 + 2j]), "c": torch.tensor([True, False])}
    swapped = {
        "a": torch.tensor(tensors["a"].numpy().byteswap()),
        "b": torch.tensor(tensors["b"].numpy().byteswap()),
        "c": tensors["c"],
    }
    path, foreign = tmp_path / "little.pth", tmp_path / "big.pth"
    torch.save(swapped, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(foreign, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, b"big" if info.filename.endswith("byteorder") else old.read(info))
    found = read_checkpoint(foreign)
    assert isinstance(found, dict)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_compressed_archive_is_read_unless_it_is_a_bomb(state: dict[str, Tensor], tmp_path: Path) -> None:
    def compressed(path: Path) -> Path:
        packed = path.with_name(f"packed-{path.name}")
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
            for info in old.infolist():
                new.writestr(info.filename, old.read(info))
        return packed

    torch.save(state, tmp_path / "a.pth")
    found = read_checkpoint(compressed(tmp_path / "a.pth"))
    assert isinstance(found, dict)
    assert same(found, state)
    torch.save({"a": torch.zeros(10_000_000)}, tmp_path / "b.pth")
    with pytest.raises(CorruptCheckpointError, match="far more bytes than the file"):
        read_checkpoint(compressed(tmp_path / "b.pth"))


def test_checksums_are_verified_if_there_are_any(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"the checksum of its entry data/\d+ is wrong"):
        read_checkpoint(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(True)
    found = read_checkpoint(path)
    assert isinstance(found, dict)
    assert same(found, state)


class Ordered(dict[str, Any]):
    """A mapping of a class of its own, which pickles its items."""


@pytest.mark.parametrize("zipped", [True, False])
def test_the_items_of_any_mapping_are_read(state: dict[str, Tensor], tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "mapping.pth"
    torch.save(Ordered(model=Ordered(state), epoch=3), path, _use_new_zipfile_serialization=zipped)
    assert same(unwrap(read_checkpoint(path)), state)


def test_a_module_under_a_wrappers_name_is_refused_unless_weights_come_first(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "both.pth"
    module = EagerResNet(get_architecture("resnet20"))
    torch.save({"epoch": 1, "model": module, "other": torch.ones(1)}, path)
    with pytest.raises(UnsafeCheckpointError, match=r"'model' holds a whole pickled nn\.Module.*EagerResNet"):
        unwrap(read_checkpoint(path))
    torch.save({"model": module, "state_dict": state}, path)
    assert same(unwrap(read_checkpoint(path)), state)


def test_the_format_of_2016_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "old.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(UnsafeCheckpointError, match=r"\.tar format of 2016.*state_dict\(\)"):
        read_checkpoint(path)


def test_a_plain_pickle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"a": [1, 2], "b": torch.ones(2)}))
    with pytest.raises(CorruptCheckpointError, match=r"a pickle that torch\.save did not write"):
        read_checkpoint(path)


def test_a_misnamed_file_is_read_with_a_warning(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.safetensors", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, tmp_path / "c.pth")
    for name, right in (("a.safetensors", "pth"), ("b.safetensors", "pth"), ("c.pth", "safetensors")):
        with pytest.warns(MisnamedFileWarning, match=rf"{name} was read.*Rename it to \*\.{right}") as warned:
            found = read_checkpoint(tmp_path / name)
        assert warned[0].filename == __file__
        assert isinstance(found, dict)
        assert same({key: found[key] for key in state}, state)
    safetensors.torch.save_file(state, tmp_path / "pytorch_model.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_checkpoint(tmp_path / "pytorch_model.bin")  # the suffix says nothing


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
