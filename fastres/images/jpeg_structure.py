"""Look at a JPEG's structure before it is decoded: the number of its scans, and the tables in its header.

The tables matter if the JPEG is decoded at a fraction of its size.

libjpeg-turbo uses any quantisation table, and most Huffman tables, without a warning. Damaged ones give coefficients
of high frequency that no encoder would write. The pixels of the whole image are then clipped, those of its low
frequencies are not.
"""

from __future__ import annotations

import functools
import re

import numpy as np

# A scan of a few bytes may cover the whole image, so a small file with many of them takes hours. Encoders write about
# ten; libjpeg-turbo's own limit is the same.
MAX_SCANS = 500
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

_HUFFMAN, _QUANTISATION, _SCAN, _END, _PROGRESSIVE = 0xC4, 0xDB, 0xDA, 0xD9, 0xC2
# The number of bits of a difference of DC coefficients, and of an AC coefficient, if samples have 8 bits.
_DC_BITS, _AC_BITS = 11, 10
# In the tables of libjpeg, of Photoshop and of cameras, an entry is less than this times its neighbours, plus 2.
_RATIO = 2


def count_scans(data: bytes, allowed: float = MAX_SCANS) -> int:
    """Return the number of scans of the first image in ``data``, or a larger number up to ``allowed``."""
    most = data.count(bytes((0xFF, _SCAN)))
    if most <= allowed:
        return most
    scans, place = 0, 2
    while (found := _NEXT_MARKER.search(data, place)) and data[found.start() + 1] != _END:
        start = found.start()
        scans += data[start + 1] == _SCAN
        place = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return scans


def plausible(data: bytes) -> bool:
    """Return whether the header of the JPEG ``data`` is laid out, and its tables look, as encoders write them.

    ``True`` does not mean that the JPEG is sound, nor ``False`` that it is damaged.
    """
    start, progressive, sound = 2, False, True
    while sound and start + 4 <= len(data) and data[start] == 0xFF:
        marker, stop = data[start + 1], start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if marker == _SCAN:
            return True
        if marker == _PROGRESSIVE:
            progressive = True
        elif marker == _QUANTISATION:
            sound = _smooth(data[start + 4 : stop])
        elif marker == _HUFFMAN:
            sound = _decodable(data[start + 4 : stop], progressive)
        start = stop
    return False


@functools.lru_cache(maxsize=256)
def _smooth(tables: bytes) -> bool:
    """Return whether the entries of the quantisation ``tables`` are near those of the neighbouring frequencies."""
    while tables:
        size = 2 if tables[0] >> 4 else 1
        if len(tables) < 1 + 64 * size:
            return False
        entries = np.frombuffer(tables[1 : 1 + 64 * size], ">u2" if size == 2 else "u1")
        table = np.empty(64)
        table[_zigzag()] = entries
        padded = np.pad(table.reshape(8, 8), 1, mode="reflect")
        around = np.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
        inside = padded[1:-1, 1:-1]
        far = (inside > _RATIO * around.max(0) + 2) | (around.min(0) > _RATIO * inside + 2) | (inside == 0)
        if far.any():
            return False
        tables = tables[1 + 64 * size :]
    return True


@functools.cache
def _zigzag() -> list[int]:
    """Return the place, row by row, of each coefficient in the order of a JPEG."""

    def order(place: int) -> tuple[int, int]:
        row, column = divmod(place, 8)
        return row + column, row if (row + column) % 2 else column

    return sorted(range(64), key=order)


@functools.lru_cache(maxsize=256)
def _decodable(tables: bytes, progressive: bool) -> bool:
    """Return whether each symbol of the Huffman ``tables`` is there once and has a meaning."""
    while tables:
        symbols = tables[17 : 17 + sum(tables[1:17])]
        if len(set(symbols)) < len(symbols):
            return False
        if tables[0] >> 4 == 0:
            known = all(symbol <= _DC_BITS for symbol in symbols)
        else:  # a run of zeros and the number of bits; without bits, the end of a block or 16 zeros
            known = all(
                symbol & 15 <= _AC_BITS and (symbol & 15 or progressive or symbol in (0, 0xF0)) for symbol in symbols
            )
        if not known:
            return False
        tables = tables[17 + len(symbols) :]
    return True
