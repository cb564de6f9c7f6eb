"""Functions are found where a library says, and every reason why they cannot be is an error of its own."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from fastres.onednn import library, symbols
from fastres.onednn.symbols import SymbolsError, function_addresses

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")

NAMES = ("dnnl_version", "dnnl_primitive_execute")


@pytest.fixture
def needs_symbols() -> None:
    if reason := library.absent():
        pytest.skip(reason)


@pytest.mark.usefixtures("needs_symbols")
def test_functions_of_torchs_library() -> None:
    found = function_addresses(library._LIBRARY, NAMES, "dnnl_")
    assert list(found) == list(NAMES)
    version = ctypes.CFUNCTYPE(ctypes.c_void_p)(found["dnnl_version"])()
    major, minor, patch = (ctypes.c_int * 3).from_address(version)
    assert f"{major}.{minor}.{patch}" == library.library().number


@pytest.mark.usefixtures("needs_symbols")
def test_a_function_that_is_not_listed_is_named() -> None:
    with pytest.raises(SymbolsError, match="does not list the function dnnl_forgotten"):
        function_addresses(library._LIBRARY, ("dnnl_version", "dnnl_forgotten"), "dnnl_")


@pytest.mark.usefixtures("needs_symbols")
def test_memory_that_differs_from_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    found = symbols._functions

    def shifted(*arguments: object) -> dict[str, int]:
        return {name: address + 1 for name, address in found(*arguments).items()}  # type: ignore[arg-type]

    code = symbols._code_in_memory(library._LIBRARY)
    monkeypatch.setattr(symbols, "_functions", shifted)
    monkeypatch.setattr(symbols, "_code_in_memory", lambda path: (code[0] - 16, *code[1:]))
    with pytest.raises(SymbolsError, match=r"dnnl_version of libtorch_cpu\.so is not in memory where its file says"):
        function_addresses(library._LIBRARY, NAMES, "dnnl_")


def test_a_library_that_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(SymbolsError, match="has not loaded"):
        function_addresses(tmp_path / "libmissing.so", NAMES, "dnnl_")


def test_a_file_that_is_not_elf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbols, "_code_in_memory", lambda path: (0, 0, 0))
    (tmp_path / "lib.so").write_bytes(b"#!/bin/sh\n" * 10)
    with pytest.raises(SymbolsError, match="not an ELF file of 64 bits"):
        function_addresses(tmp_path / "lib.so", NAMES, "dnnl_")
    (tmp_path / "empty.so").write_bytes(b"")
    with pytest.raises(SymbolsError, match=r"empty\.so cannot be read"):
        function_addresses(tmp_path / "empty.so", NAMES, "dnnl_")


def test_a_system_without_maps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(symbols, "MAPS", tmp_path / "maps")
    with pytest.raises(SymbolsError, match="does not show what is in memory"):
        function_addresses(tmp_path / "lib.so", NAMES, "dnnl_")


@pytest.mark.usefixtures("needs_symbols")
def test_a_library_without_the_table(tmp_path: Path) -> None:
    """A stripped copy of Python's own math module: it exports functions, but lists no others."""
    import math

    source = Path(getattr(math, "__file__", "") or "")
    if not source.is_file():
        pytest.skip("math is built into this Python")
    copied = tmp_path / "stripped.so"
    if subprocess.run(["strip", "-o", copied, source], check=False, capture_output=True).returncode:
        pytest.skip("strip is not installed")
    ctypes.CDLL(str(copied))
    with pytest.raises(SymbolsError, match=r"stripped\.so has no table of all symbols"):
        function_addresses(copied, ("PyInit_math",), "PyInit_")
