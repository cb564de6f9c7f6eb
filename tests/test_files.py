"""Files are written completely or not at all, only regular files are opened, and inputs are not overwritten."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from fastres.errors import OutputError
from fastres.files import open_regular, refuse_inputs, written_whole


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


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"content"
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
        for path, kind in (
            (tmp_path / "pipe", r"a named pipe \(FIFO\)"),
            (tmp_path / "socket", "a socket"),
            (Path("/dev/zero"), "a device"),
            (tmp_path, "a folder"),
        ):
            with pytest.raises(OSError, match=f"it is {kind}, not a regular file"):
                open_regular(path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")


def test_a_pipe_in_place_of_a_file_just_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    facts = os.stat(__file__)
    monkeypatch.setattr(os, "stat", lambda path: facts)
    with pytest.raises(OSError, match="a named pipe"):
        open_regular(tmp_path / "pipe")


def test_no_output_is_an_input(tmp_path: Path) -> None:
    source = tmp_path / "folder" / "source"
    source.parent.mkdir()
    source.write_bytes(b"")
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "hard").hardlink_to(source)
    for output in (source, tmp_path / "link" / "source", tmp_path / "hard", tmp_path / "folder" / ".." / "hard"):
        with pytest.raises(OutputError, match="is the input"):
            refuse_inputs(output, ["elsewhere", source])
    for output in (source.parent, tmp_path / "link"):
        with pytest.raises(OutputError, match="holds the input"):
            refuse_inputs(output, [source])
    with pytest.raises(OutputError, match="is the input 'nothing'"):
        refuse_inputs(os.path.abspath("nothing"), ["nothing"])
    refuse_inputs(source.parent / "other", [source, source.parent])
    refuse_inputs(tmp_path / "fold", [source])
