"""Find functions in a loaded library by its table of all symbols, not only of those that it exports.

torch links oneDNN statically and exports none of its functions. Its Linux wheels keep the table of all symbols, which
debuggers and profilers read, so the functions can be found. The table is read as the ELF standard describes it, for 64
bits and little-endian numbers.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Collection
from pathlib import Path

import numpy as np

from fastres.errors import FastresError

MAPS = Path("/proc/self/maps")

_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_SEGMENTS_AT, _SECTIONS_AT, _COUNTS_AT = 32, 40, 54  # fields of the header
_LOADED, _SYMBOL_TABLE, _FUNCTION = 1, 2, 2  # a type of segment, of section and of symbol
_SEGMENT, _SECTION = struct.Struct("<IIQQQQQQ"), struct.Struct("<IIQQQQIIQQ")
_SYMBOL = np.dtype([
    ("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"), ("size", "<u8")
])  # fmt: skip
_COMPARED = 16  # bytes of each function that must be the same in memory as in the file


class SymbolsError(FastresError):
    """The library is not loaded, or its functions cannot be found."""


def function_addresses(library: Path, names: Collection[str], prefix: str) -> dict[str, int]:
    """Return the address in this process of each function of ``library`` in ``names``, which all have the ``prefix``.

    Raises ``SymbolsError`` if the process has not loaded the library, if its file does not list one of the functions,
    or if memory and file differ.
    """
    base, begin, end = _code_in_memory(library)
    try:
        data = np.memmap(library, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise SymbolsError(f"{library.name} cannot be read: {error}") from error
    if bytes(data[: len(_MAGIC)]) != _MAGIC:
        raise SymbolsError(f"{library.name} is not an ELF file of 64 bits")
    found = _functions(data, library.name, prefix.encode())
    if missing := [name for name in names if name not in found]:
        raise SymbolsError(f"{library.name} does not list the function {missing[0]}")
    segments = [segment for segment in _table(data, _SEGMENTS_AT, _SEGMENT) if segment[0] == _LOADED]
    for name in names:
        relative = found[name]
        address, offset = base + relative, _offset(segments, relative)
        inside = begin <= address and address + _COMPARED <= end
        if not inside or ctypes.string_at(address, _COMPARED) != bytes(data[offset : offset + _COMPARED]):
            raise SymbolsError(f"{name} of {library.name} is not in memory where its file says")
    return {name: base + found[name] for name in names}


def _code_in_memory(library: Path) -> tuple[int, int, int]:
    """Return the address that relative addresses of ``library`` count from, and where its code begins and ends."""
    try:
        lines = MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise SymbolsError(f"The system does not show what is in memory: {error}") from error
    base, code = None, None
    for line in lines:
        span, rights, offset, *rest = line.split(maxsplit=5)
        if rest[-1] != str(library):
            continue
        begin, end = (int(part, 16) for part in span.split("-"))
        if int(offset, 16) == 0 and base is None:
            base = begin
        if "x" in rights:
            code = (min(begin, code[0]), max(end, code[1])) if code else (begin, end)
    if base is None or code is None:
        raise SymbolsError(f"This process has not loaded {library}")
    return base, *code


def _functions(data: np.ndarray, library: str, prefix: bytes) -> dict[str, int]:
    """Return the relative addresses of the functions in the table of all symbols, by name."""
    sections = _table(data, _SECTIONS_AT, _SECTION)
    tables = [section for section in sections if section[1] == _SYMBOL_TABLE]
    if not tables:
        raise SymbolsError(f"{library} has no table of all symbols")
    _, _, _, _, offset, size, strings, *_ = tables[0]
    names = data[sections[strings][4] :]
    symbols = data[offset : offset + size].view(_SYMBOL)
    symbols = symbols[((symbols["info"] & 15) == _FUNCTION) & (symbols["section"] != 0)]
    for index, letter in enumerate(prefix):
        symbols = symbols[names[symbols["name"] + index] == letter]
    return {_text(names, int(name)): int(value) for name, value in zip(symbols["name"], symbols["value"], strict=True)}


def _offset(segments: list[tuple[int, ...]], relative: int) -> int:
    """Return where in the file the byte with this relative address is."""
    for _, _, offset, address, _, size, *_ in segments:
        if address <= relative < address + size:
            return offset + relative - address
    return 0


def _table(data: np.ndarray, field: int, entry: struct.Struct) -> list[tuple[int, ...]]:
    """Return the entries of one of the two tables that the header points to."""
    (start,) = struct.unpack_from("<Q", data[field : field + 8].tobytes())
    counts = struct.unpack("<4H", data[_COUNTS_AT : _COUNTS_AT + 8].tobytes())  # size and number, of both tables
    size, number = counts[:2] if field == _SEGMENTS_AT else counts[2:]
    return [entry.unpack_from(data[start + index * size :][:size].tobytes()) for index in range(number)]


def _text(names: np.ndarray, start: int) -> str:
    return names[start : start + 256].tobytes().partition(b"\0")[0].decode("ascii", "replace")
