"""Hostile pickles: nothing in them runs, changes the process, or needs more memory than the file allows."""

from __future__ import annotations

import builtins
import copyreg
import functools
import io
import os
import pickle
import pickletools
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastres.errors import CorruptCheckpointError, FastresError, UnsafeCheckpointError
from fastres.weights.checkpoints import read_checkpoint
from fastres.weights.unpickling import Inert, Unpickler, key_of
from fastres.weights.wrapping import unwrap

from .state_dicts import distinct_state, same


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return distinct_state("resnet20")


class Calls:
    """Pickles to a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __call__(self) -> None:
        """So that the call may itself be called: pickle asks for that."""

    def __reduce__(self) -> Any:
        return self.call


class Sets:
    """Pickles to an object with a state, whose class has a ``__setstate__``."""

    def __reduce__(self) -> Any:
        return (functools.partial, (print,), (os.mkdir, ("made",), {}, None))


def exploits(folder: str) -> dict[str, Any]:
    """Return objects that make ``folder`` if a careless reader unpickles them."""
    code = f"__import__('os').mkdir({folder!r})"
    return {
        "os.mkdir": Calls(os.mkdir, folder),
        "os.system": Calls(os.system, f"mkdir {folder}"),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "getattr": Calls(Calls(getattr, os, "mkdir"), folder),
        "partial": Calls(Calls(functools.partial, os.mkdir, folder)),
        "__import__": Calls(builtins.__import__, "antigravity"),
        "subprocess": Calls(subprocess.check_call, ["mkdir", folder]),
        "torch.hub": Calls(torch.hub.list, folder),
        "torch.load": Calls(torch.load, folder),
        "open": Calls(open, folder, "x"),
        "setstate": Sets(),
        "extension": Calls(copyreg.add_extension, "os", "mkdir", 77),
    }


def dumped(obj: Any, protocol: int) -> bytes:
    """Pickle an object whose calls may be nested, as ``os`` itself cannot be pickled."""
    stream = io.BytesIO()

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: object) -> Any:
            if value is os:
                return (builtins.__import__, ("os",))
            return NotImplemented

    Pickler(stream, protocol).dump(obj)
    return stream.getvalue()


def saved(obj: Any, path: Path, form: str, protocol: int = 2) -> Path:
    """Save ``obj`` as torch does."""
    content = dumped(obj, protocol) if form == "raw" else b""
    if form == "raw":
        path.write_bytes(content)
    else:
        torch.save(obj, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("name", [name for name in exploits("") if name != "getattr"])
@pytest.mark.parametrize("form", ["zip", "old"])
def test_code_beside_the_weights_is_not_run(state: dict[str, Tensor], tmp_path: Path, form: str, name: str) -> None:
    folder = tmp_path / "made"
    modules = set(sys.modules)
    path = saved({"state_dict": state, "extra": exploits(str(folder))[name]}, tmp_path / "evil.pth", form)
    assert same(unwrap(read_checkpoint(path)), state)
    assert not folder.exists()
    assert "antigravity" not in set(sys.modules) - modules
    assert ("os", "mkdir") not in copyreg._extension_registry  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", exploits(""))
@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_code_alone_is_refused_and_not_run(tmp_path: Path, protocol: int, name: str) -> None:
    folder = tmp_path / "made"
    path = saved([exploits(str(folder))[name]], tmp_path / "evil.pth", "raw", protocol)
    with pytest.raises(UnsafeCheckpointError, match=r"its pickle uses .*Nothing of it was run"):
        read_checkpoint(path)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["os.mkdir", "eval", "partial"])
def test_code_among_the_weights_is_refused_and_not_run(state: dict[str, Tensor], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "made"
    evil = {**state, "fc.weight": exploits(str(folder))[name]}
    path = saved({"state_dict": evil}, tmp_path / "evil.pth", "zip")
    with pytest.raises(UnsafeCheckpointError, match=r"Among the weights are objects.*'fc\.weight' \("):
        unwrap(read_checkpoint(path))
    assert not folder.exists()


def loaded(content: bytes, limit: int = 100) -> Any:
    return Unpickler(io.BytesIO(content), limit, no_storage).load()


def no_storage(dtype: torch.dtype, key: Any, count: int, view: Any) -> Tensor:
    return torch.zeros(count * dtype.itemsize, dtype=torch.uint8)


def test_what_a_name_becomes_has_no_effect_on_the_process() -> None:
    """BUILD sets attributes, and items of a dictionary, on whatever is on the stack."""
    state = b"}X\x0c\x00\x00\x00__defaults__Ns"
    found = loaded(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN" + state + b"\x86b.")
    assert isinstance(found, Inert)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)
    assert loaded(b"\x80\x02ccollections\nOrderedDict\n}X\x08\x00\x00\x00__init__Nsb.") is not None
    assert callable(dict.__init__)
    for value in (found, loaded(b"\x80\x02cos\nsystem\n."), loaded(b"\x80\x02ctorch\nload\n.")):
        assert not callable(value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x80\x02K\x01)R.", "a number is called"),
        (b"\x80\x02X\x01\x00\x00\x00a)R.", "a string is called"),
        (b"\x80\x02\x82\x01.", "an extension"),
        (b"\x80\x02](K\x01K\x02u.", "items of a list are set"),
        (b"\x80\x02K\x01Q.", "another persistent id"),
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + struct.pack("<q", 1 << 50) + b"\x85R.", None),
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 50) + b"ab.", "a long bytearray"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"ab.", "long bytes"),
        (b"\x80\x04\x95" + struct.pack("<Q", 1 << 50) + b"ab.", "a long frame"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", None),
    ],
)
def test_damage_and_bombs_end_in_an_error_or_nothing(content: bytes, what: str | None) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if what is None:
        loaded(content)
    else:
        with pytest.raises(Exception, match=r".*"):
            loaded(content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_containers_cannot_grow_by_repetition() -> None:
    """A pickle of a few kilobytes that copies one list a thousand times."""
    items = b"(" + b"N" * 200_000 + b"l"
    copies = b"".join(b"cbuiltins\nset\nh\x00\x85R0" for _ in range(2000))
    with pytest.raises(pickle.UnpicklingError, match="hold more than the file"):
        loaded(b"\x80\x02" + items + b"q\x00" + copies + b".", limit=400_000)


def test_a_tensor_is_no_larger_than_the_file_allows() -> None:
    def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, count: int = 4) -> bytes:
        class Storage:
            pass

        stream = io.BytesIO()

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: object) -> Any:
                return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(obj, Storage) else None

        rebuild = Calls(torch._utils._rebuild_tensor_v2, Storage(), offset, size, stride, False, {})
        Pickler(stream, 2).dump(rebuild)
        return stream.getvalue()

    assert loaded(tensor((2, 2), (2, 1))).shape == (2, 2)
    assert loaded(tensor((1000, 4), (0, 1))).shape == (1000, 4)
    for size, stride, offset in (((1 << 40,), (0,), 0), ((5,), (1,), 0), ((4,), (1,), 1), ((-1,), (1,), 0)):
        with pytest.raises(Exception, match=r"more elements|out of bounds|damaged"):
            loaded(tensor(size, stride, offset))


def test_deep_keys_are_replaced() -> None:
    """Hashing a tuple a million deep crashes Python."""
    deep: Any = ()
    for _ in range(1_000_000):
        deep = (deep,)
    assert isinstance(key_of(deep), Inert)
    assert key_of((1, "a")) == (1, "a")
    content = b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"Ns."
    (key,) = loaded(content)
    assert isinstance(key, Inert)


def test_a_cycle_ends(tmp_path: Path) -> None:
    cycle: list[Any] = [Calls(os.mkdir, "made")]
    cycle.append(cycle)
    torch.save(cycle, tmp_path / "cycle.pth")
    with pytest.raises(UnsafeCheckpointError):
        read_checkpoint(tmp_path / "cycle.pth")


def test_a_deep_pickle_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep.pth"
    torch.save({"a": torch.ones(1)}, path)
    with zipfile.ZipFile(path) as old:
        content = {info.filename: old.read(info) for info in old.infolist()}
    content["deep/data.pkl"] = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    with zipfile.ZipFile(path, "w") as new:
        for name, data in content.items():
            new.writestr(name, data)
    with pytest.raises(FastresError, match="holds a list"):
        unwrap(read_checkpoint(path))


def test_the_opcodes_that_could_call_are_all_replaced() -> None:
    """Every instruction that finds, calls or builds is one of this package's, or only pushes a name."""
    calling = {"REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
    codes = {op.name: ord(op.code) for op in pickletools.opcodes}
    for name in calling:
        assert Unpickler.dispatch[codes[name]].__module__ == Unpickler.__module__, name
    assert Unpickler.find_class is not pickle._Unpickler.find_class  # type: ignore[attr-defined]


def test_two_entries_of_one_name_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "two.pth"
    torch.save(state, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("two/data/0", b"x")
    with pytest.raises(CorruptCheckpointError, match="two entries of one name"):
        read_checkpoint(path)
