"""The files that ``torch.save`` writes: a zip archive, or before 2020 a sequence of pickles and storages.

Both hold one pickle with the structure, and the bytes of each storage. The pickle is read by
:class:`~fastres.weights.unpickling.Unpickler`, which runs nothing from it. While it is read, storages are only
allocated. Then a few threads fill them and verify the archive's checksums.
"""

from __future__ import annotations

import io
import os
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .unpickling import LoadStorage, Unpickler

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of an old file
_LOCAL_HEADER = 30  # bytes before the name of an entry
_EXPANSION = 16  # the storages of a compressed archive have at most this many times its bytes
_THREADS = 4
_SMALL = 1 << 22  # bytes that another thread is worth
_PIECE = 1 << 18  # bytes that are read and checked at a time, while they are in the processor's cache
_ORDERS = {b"little": "little", b"big": "big"}


class DamageError(Exception):
    """A file of torch.save is damaged; the message says how, in a few words."""


class OtherFormatError(Exception):
    """An archive or pickle was written by something other than torch.save; the argument is its names."""


@dataclass(frozen=True)
class Content:
    """What a file holds, and the names that its pickle uses beyond tensors and plain data."""

    value: object
    unknown: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Part:
    """Where the bytes of a storage are in the file; ``checksum`` is 0 if there is none."""

    name: str
    begin: int
    data: Tensor
    checksum: int = 0


def read_zip(path: Path) -> Content:
    """Read an archive of ``torch.save``.

    Raises ``OtherFormatError`` with the names of the entries for another archive, and any exception for a damaged one.
    """
    with open(path, "rb", buffering=0) as stream, zipfile.ZipFile(stream) as zipped:
        entries = {info.filename: info for info in zipped.infolist()}
        if len(entries) != len(zipped.infolist()):
            raise DamageError("it has two entries of one name")
        archive = _Archive(stream, entries, _root(list(entries)))
        content = _unpickled(io.BytesIO(archive.record("data.pkl")), archive.size, archive.storage)
    _fill(path, archive.parts)
    for dtype, data in archive.swapped:
        _swap(data, dtype)
    return content


def _root(names: list[str]) -> str:
    """Return the folder in the archive that everything is in, with its slash."""
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if not roots or f"{roots[0]}constants.pkl" in names:
        raise OtherFormatError(names)
    return roots[0]


class _Archive:
    """An open archive, whose entries are in the folder ``root``.

    ``parts`` are the storages to fill, and ``swapped`` those whose bytes are then to be swapped.
    """

    def __init__(self, stream: io.FileIO, entries: dict[str, zipfile.ZipInfo], root: str) -> None:
        self.size = os.fstat(stream.fileno()).st_size
        self.parts: list[_Part] = []
        self.swapped: list[tuple[torch.dtype, Tensor]] = []
        self._stream = stream
        self._entries = entries
        self._root = root
        self._left = _EXPANSION * self.size
        self._storages: dict[str, Tensor] = {}
        order = self.record("byteorder") if f"{root}byteorder" in entries else b"little"
        if order not in _ORDERS:
            raise DamageError("its byte order is unknown")
        self._foreign = _ORDERS[order] != sys.byteorder

    def record(self, name: str) -> bytes:
        """Return the content of a small entry."""
        info, begin = self._find(name)
        self._stream.seek(begin)
        content = self._stream.read(info.compress_size)
        if info.compress_type == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-15).decompress(content, info.file_size + 1)
        if len(content) != info.file_size or (info.CRC and zlib.crc32(content) != info.CRC):
            raise DamageError(f"its entry {name} is damaged")
        return content

    def storage(self, dtype: torch.dtype, key: Any, count: int, view: Any) -> Tensor:
        """Return the memory of a storage, uint8 ``[n]``, to be filled later unless it is compressed."""
        if not isinstance(key, str) or view is not None:
            raise DamageError("the description of a storage is damaged")
        if key not in self._storages:
            self._storages[key] = self._allocated(f"data/{key}", dtype)
        if self._storages[key].numel() != count * dtype.itemsize:
            raise DamageError(f"its storage {key} has another size than its pickle says")
        return self._storages[key]

    def _allocated(self, name: str, dtype: torch.dtype) -> Tensor:
        info, begin = self._find(name)
        if info.compress_type == zipfile.ZIP_DEFLATED:
            data = torch.frombuffer(bytearray(self.record(name)), dtype=torch.uint8) if info.file_size else _empty(0)
        elif info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size:
            data = _empty(info.file_size)
            self.parts.append(_Part(f"entry {name}", begin, data, info.CRC))
        else:
            raise DamageError(f"its entry {name} has an unknown compression")
        if self._foreign:
            self.swapped.append((dtype, data))
        return data

    def _find(self, name: str) -> tuple[zipfile.ZipInfo, int]:
        """Return an entry and where its content begins."""
        info = self._entries.get(self._root + name)
        if info is None:
            raise DamageError(f"it has no entry {name}")
        self._left -= info.file_size
        if self._left < 0:
            raise DamageError("its entries have far more bytes than the file")
        self._stream.seek(max(info.header_offset, 0))
        header = self._stream.read(_LOCAL_HEADER)
        lengths = [int.from_bytes(header[place : place + 2], "little") for place in (26, 28)]
        begin = info.header_offset + _LOCAL_HEADER + sum(lengths)
        if (
            info.header_offset < 0
            or header[:4] != b"PK\x03\x04"
            or info.flag_bits & 1
            or begin + info.compress_size > self.size
        ):
            raise DamageError(f"its entry {name} is damaged")
        return info, begin


def read_old(path: Path) -> Content:
    """Read a file of ``torch.save`` from before 2020: pickles, then the storages.

    Raises ``OtherFormatError`` with the names that it uses for another pickle, and any exception for a damaged one.
    """
    with open(path, "rb") as opened:
        stream = _Bounded(opened)
        magic = _unpickled(stream, stream.size, _no_storage)
        if magic.value != _MAGIC or type(magic.value) is not int:
            raise OtherFormatError(magic.unknown)
        if _unpickled(stream, stream.size, _no_storage).value != _PROTOCOL:
            raise DamageError("its version of the format is unknown")
        system = _unpickled(stream, stream.size, _no_storage).value
        storages = _Storages(stream.size)
        content = _unpickled(stream, stream.size, storages.storage)
        keys = _unpickled(stream, stream.size, _no_storage).value
        big = isinstance(system, dict) and system.get("little_endian") is False
        parts = storages.parts(keys, stream, "big" if big else "little")
    _fill(path, parts)
    if big != (sys.byteorder == "big"):
        for dtype, data in storages.allocated.values():
            _swap(data, dtype)
    return content


class _Bounded:
    """An open file, which allocates no more than it holds if a damaged length asks for more."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self.size = os.fstat(stream.fileno()).st_size
        self.readline = stream.readline
        self.tell = stream.tell
        self.seek = stream.seek
        self._stream = stream

    def read(self, count: int) -> bytes:
        return self._stream.read(count if count < _PIECE else min(count, self.size - self.tell()))


class _Storages:
    """The storages of an old file of ``size`` bytes; ``allocated`` has their dtypes and bytes by key."""

    def __init__(self, size: int) -> None:
        self.allocated: dict[Any, tuple[torch.dtype, Tensor]] = {}
        self._left = size

    def storage(self, dtype: torch.dtype, key: Any, count: int, view: Any) -> Tensor:
        """Return the memory of a storage, or of a view: its key, the first element and the number of elements."""
        if key not in self.allocated:
            self._left -= count * dtype.itemsize
            if self._left < 0:
                raise DamageError("it ends too early")
            self.allocated[key] = dtype, _empty(count * dtype.itemsize)
        data = self.allocated[key][1]
        if data.numel() != count * dtype.itemsize:
            raise DamageError(f"its storage {key!r:.40} has two sizes")
        if view is None:
            return data
        _, offset, length = view
        if type(offset) is not int or type(length) is not int or not 0 <= offset <= offset + length <= count:
            raise DamageError("the description of a view is damaged")
        return data[offset * dtype.itemsize : (offset + length) * dtype.itemsize]

    def parts(self, keys: object, stream: _Bounded, order: Any) -> list[_Part]:
        """Return where the storages are, which begin at the place of ``stream`` in the order of ``keys``."""
        if not isinstance(keys, list) or len(keys) != len(self.allocated) or set(keys) != set(self.allocated):
            raise DamageError("the list of its storages is damaged")
        parts = []
        for key in keys:
            dtype, data = self.allocated[key]
            count = int.from_bytes(stream.read(8), order, signed=True)
            if count * dtype.itemsize != data.numel():
                raise DamageError(f"its storage {key!r:.40} has another size than its pickle says")
            parts.append(_Part(f"storage {key!r:.40}", stream.tell(), data))
            stream.seek(data.numel(), os.SEEK_CUR)
        if stream.tell() > stream.size:
            raise DamageError("it ends too early")
        return parts


def _no_storage(dtype: torch.dtype, key: Any, count: int, view: Any) -> Tensor:
    raise DamageError("it has a storage in an unexpected place")


def _unpickled(stream: Any, size: int, load_storage: LoadStorage) -> Content:
    reader = Unpickler(stream, size, load_storage)
    try:
        return Content(reader.load(), tuple(reader.unknown))
    finally:
        vars(reader).clear()  # it refers to itself, so the tensors would stay until the garbage collector runs


def _empty(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="cpu")


def _fill(path: Path, parts: list[_Part]) -> None:
    """Read the bytes of all parts and check them."""
    threads = min(_THREADS, os.cpu_count() or 1, 1 + sum(part.data.numel() for part in parts) // _SMALL)
    if threads == 1:
        _read_parts(path, parts)
        return
    ordered = sorted(parts, key=lambda part: part.data.numel())
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda first: _read_parts(path, ordered[first::threads]), range(threads)))


def _read_parts(path: Path, parts: list[_Part]) -> None:
    with open(path, "rb", buffering=0) as stream:
        for part in parts:
            stream.seek(part.begin)
            view = part.data.numpy().data
            done, checksum = 0, 0
            while done < len(view):
                count = stream.readinto(view[done : done + _PIECE])
                if not count:
                    raise DamageError("it ends too early")
                if part.checksum:  # PyTorch can be told to write zeros
                    checksum = zlib.crc32(view[done : done + count], checksum)
                done += count
            if checksum != part.checksum:
                raise DamageError(f"the checksum of its {part.name} is wrong")


def _swap(data: Tensor, dtype: torch.dtype) -> None:
    """Give the bytes of numbers the other order, in place."""
    width = dtype.itemsize // (2 if dtype.is_complex else 1)
    data.copy_(data.view(-1, width).flip(1).reshape(-1))
