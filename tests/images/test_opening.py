"""fastres.images.opening: what is not a readable regular file is refused at once, by both decoders alike."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from fastres.errors import ImageError
from fastres.images import jpeg, opening
from fastres.images.decoding import load_image
from fastres.images.jpeg import exact_pixels, fast_pixels
from fastres.images.transforms import Transforms

from .damage import encoded, picture

TRANSFORMS = Transforms(resize=32, crop=32)


def refusal(path: str | Path) -> str:
    """Return the message, which is the same for both decoders."""
    messages = []
    for decode in (exact_pixels, fast_pixels):
        with pytest.raises(ImageError) as caught:
            decode(str(path), TRANSFORMS)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    messages[0].encode()  # printable
    return messages[0]


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def loop(path: Path) -> None:
    path.symlink_to(path)


def nowhere(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (pipe, "is a named pipe (FIFO); pass the path of an image file"),
        (unix_socket, "is a socket; pass the path of an image file"),
        (link_to_device, "is a device; pass the path of an image file"),
        (Path.mkdir, "is a folder; pass a list of its files"),
        (Path.touch, "is empty (0 bytes)"),
        (loop, "cannot be read: Too many levels of symbolic links"),
        (nowhere, "does not exist"),
    ],
)
def test_other_kinds_of_files(
    make: Callable[[Path], None], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("x.jpg"))
    assert f"'x.jpg' {reason}" in refusal("x.jpg")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"caf\xe9.jpg", r"'caf\xe9.jpg' does not exist"),
        (b"a\nb.jpg", r"'a\nb.jpg' does not exist"),
        ("café.jpg".encode(), "'café.jpg' does not exist"),
        (rb"a\udce9.jpg", r"'a\\udce9.jpg' does not exist"),
        (b"a\0b", r"'a\x00b' cannot be read"),
        (b"x" * 5000, "cannot be read: File name too long"),
        (b"https://x.org/" + b"x" * 5000, "is a URL"),
        (b"x.jpg/y", "does not exist"),
    ],
)
def test_names_in_messages(name: bytes, shown: str) -> None:
    assert shown in refusal(os.fsdecode(name))


def test_current_folder_that_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    assert "'a.jpg' does not exist in the current folder, which does not exist either" in refusal("a.jpg")


@pytest.mark.parametrize(("format", "options"), [("JPEG", {}), ("PNG", {}), ("TIFF", {"compression": "tiff_lzw"})])
def test_files_that_change_while_they_are_read(
    format: str, options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings.filterwarnings("ignore", module=r"PIL\.")
    path, data = tmp_path / "x", encoded(picture(300, 260), format, **options)
    opened = opening.open_regular

    def shortened(name: str) -> object:
        file = opened(name)
        os.truncate(name, len(data) // 2)
        return file

    for place in (opening, jpeg):
        monkeypatch.setattr(place, "open_regular", shortened)
    for decode in (exact_pixels, fast_pixels):
        path.write_bytes(data)
        with pytest.raises(ImageError, match=r"cannot be decoded|first bytes are damaged"):
            decode(str(path), TRANSFORMS)


def test_libtiff_cannot_map_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    path.write_bytes(encoded(picture(30, 26), "TIFF", compression="tiff_lzw"))
    with opening.open_image(path) as file, pytest.raises(OSError, match="fileno"):
        file.fileno()
    assert load_image(path).size == (30, 26)


def test_errors_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(picture(30, 26)))

    class Broken(opening._Streamed):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(opening, "_Streamed", Broken)
    monkeypatch.setattr(jpeg, "_content", lambda source: Broken(opening.open_regular(source)).read())
    assert "x.jpg' cannot be read: Input/output error." in refusal(path)
