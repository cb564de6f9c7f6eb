"""oneDNN's functions are called where they can be, and errors that they report are raised."""

from __future__ import annotations

import platform
import sys

import pytest
import torch

from fastres.errors import DeviceError, OneDnnError
from fastres.onednn import library
from fastres.onednn.symbols import SymbolsError


@pytest.fixture
def asked_again() -> None:
    library._library.cache_clear()


@pytest.fixture(autouse=True)
def forgotten() -> object:
    yield
    library._library.cache_clear()


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="Linux on x86_64 only")
def test_official_wheels_have_the_functions() -> None:
    assert library.absent() is None
    assert library.library().number in torch.__config__.show()


@pytest.mark.usefixtures("asked_again")
@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("win32", "AMD64"), ("linux", "aarch64")])
def test_other_systems_say_so(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert f"on {machine}, and it is done on Linux on x86_64 only" in (library.absent() or "")
    with pytest.raises(DeviceError, match="oneDNN cannot be called directly"):
        library.library()


@pytest.mark.usefixtures("asked_again")
def test_a_library_without_symbols_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def stripped(*arguments: object) -> dict[str, int]:
        raise SymbolsError("libtorch_cpu.so has no table of all symbols")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(library, "function_addresses", stripped)
    assert library.absent() == "libtorch_cpu.so has no table of all symbols"


@pytest.mark.usefixtures("asked_again")
def test_another_interface_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_MAJOR", 4)
    if (reason := library.absent()) and "x86_64 only" in reason:
        pytest.skip(reason)
    assert "but 4.x with OpenMP is needed" in (reason or "")


@pytest.mark.skipif(library.absent() is not None, reason="oneDNN's functions cannot be called here")
def test_what_onednn_refuses_is_an_error() -> None:
    onednn = library.library()
    with pytest.raises(OneDnnError, match=r"dnnl_primitive_create says 'invalid arguments'.*WITHOUT=primitives"):
        onednn.created(onednn.primitive_create, None)


def test_no_memory_left_is_pythons_error() -> None:
    with pytest.raises(MemoryError, match="dnnl_memory_create"):
        library._check("memory_create", 1)
    with pytest.raises(OneDnnError, match="says 'status 99'"):
        library._check("memory_create", 99)
