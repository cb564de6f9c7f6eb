"""Files are written completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastres.files import written_whole


@pytest.mark.parametrize("before", [None, b"before"])
def test_takes_its_place_when_the_block_ends(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_bytes(before)
    with written_whole(path) as temporary:
        assert temporary.parent == tmp_path, "a rename only works within one file system"
        assert not temporary.exists()
        temporary.write_bytes(b"after")
        assert (path.read_bytes() if path.exists() else None) == before
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_an_error_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(b"before")

    def fail() -> None:
        with written_whole(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)) as raised:
        fail()
    assert raised.value is error
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_two_at_a_time_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with written_whole(path) as first, written_whole(path) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first", "the content of the last to end"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_take_its_place_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(IsADirectoryError), written_whole(path) as temporary:
        temporary.write_bytes(b"content")
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "file.txt"):
        pass
    assert list(tmp_path.iterdir()) == []
