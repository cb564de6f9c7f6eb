"""An object as a file that can be read and searched, by requests for ranges."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

LEAST, MOST = 1 << 18, 1 << 23  # bytes of a request, unless more are asked for at once


class ObjectFile(io.RawIOBase):
    """An object of ``size`` bytes as a file; ``fetch(start, stop)`` returns its bytes, or raises an error.

    Requests get longer, up to ``MOST`` bytes, while the file is read from one place to the next, and shorter again when
    parts are left out. ``failure`` is the error of the request that failed last: libraries for file formats may turn it
    into one of their own.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self.size = size
        self.failure: Exception | None = None
        self._fetch = fetch
        self._position = self._start = 0
        self._data = b""
        self._length = LEAST

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if origin + offset < 0:
            raise ValueError(f"The position {origin + offset} is before the beginning of the file")
        self._position = origin + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        wanted = self.size - self._position if size is None or size < 0 else size
        stop = min(self._position + max(wanted, 0), self.size)
        if stop <= self._position:
            return b""
        inside = self._position - self._start
        held = self._data[inside : inside + stop - self._position] if 0 <= inside < len(self._data) else b""
        self._position += len(held)
        if self._position < stop:
            self._fill(stop)
            rest = self._data[: stop - self._position]
            self._position += len(rest)
            held = held + rest if held else rest
        return held

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _fill(self, stop: int) -> None:
        """Request the bytes from the position to ``stop`` at least."""
        end = self._start + len(self._data)
        near = end <= self._position < end + self._length
        self._length = min(self._length * 2, MOST) if near and self._data else max(self._length // 2, LEAST)
        stop = min(max(stop, self._position + self._length), self.size)
        try:
            self._data = self._fetch(self._position, stop)
        except Exception as error:
            self.failure = error
            raise
        self._start = self._position
