"""fastres.storage.inputs: an object as a file, with few requests that are not longer than needed."""

from __future__ import annotations

import io
import random

import pytest

from fastres.storage.inputs import LEAST, MOST, ObjectFile

CONTENT = random.Random(0).randbytes(3 * MOST + 12345)


class Store:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.requests: list[tuple[int, int]] = []
        self.file = ObjectFile(self.fetch, len(content))

    def fetch(self, start: int, stop: int) -> bytes:
        self.requests.append((start, stop))
        return self.content[start:stop]

    @property
    def transferred(self) -> int:
        return sum(stop - start for start, stop in self.requests)


def test_it_reads_like_a_file() -> None:
    content = CONTENT[: 3 * LEAST + 17]
    store, usual = Store(content), io.BytesIO(content)
    with store.file as file:
        for _ in range(500):
            whence = random.choice([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END])
            offset = random.randint(-len(content), len(content) + 99)
            try:
                assert file.seek(offset, whence) == usual.seek(offset, whence)
            except ValueError:
                file.seek(usual.tell())
                continue
            size = random.choice([0, 1, 512, LEAST, 2 * LEAST, -1, None])
            assert file.read(size) == usual.read(size)  # type: ignore[arg-type]
            assert file.tell() == usual.tell() or file.tell() >= len(content)
    assert all(0 <= start < stop <= len(content) for start, stop in store.requests)


def test_sequential_reading_takes_few_requests_and_nothing_twice() -> None:
    store = Store(CONTENT)
    assert b"".join(iter(lambda: store.file.read(5000), b"")) == CONTENT
    assert store.transferred == len(CONTENT)
    assert len(store.requests) < 12


def test_what_is_left_out_is_not_transferred() -> None:
    store = Store(CONTENT)
    for position in range(0, len(CONTENT), 2 * MOST // 3):
        store.file.seek(position)
        assert store.file.read(512) == CONTENT[position : position + 512]
    assert all(stop - start <= LEAST for start, stop in store.requests)


def test_it_can_be_buffered() -> None:
    file = io.BufferedReader(Store(CONTENT).file)
    file.seek(MOST - 5)
    assert file.read(1 << 20) == CONTENT[MOST - 5 :][: 1 << 20]


def test_a_failure_is_remembered() -> None:
    def fetch(start: int, stop: int) -> bytes:
        raise OSError("no")

    file = ObjectFile(fetch, 5)
    with pytest.raises(OSError, match="no"):
        file.read(1)
    assert isinstance(file.failure, OSError)
