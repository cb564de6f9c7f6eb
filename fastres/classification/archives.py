"""Read the headers of a tar file strictly: whatever is not a whole, sound archive is reported, and reading goes on.

Python's ``tarfile`` parses the headers. But where it ends silently at the first header that is damaged, zeroed or cut
off, this module yields a :class:`Damage` and resumes at the next sound header, as GNU tar does.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from fastres.errors import SourceError
from fastres.text import path_text

BLOCK, RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
END = 2 * BLOCK  # zero bytes that end an archive
_PIECE = 1 << 20
_MAX_EXTENSION = 1 << 20  # bytes of the names and attributes in front of a header
_MAX_CHAIN = 8  # headers that extend one another
_LARGEST_OCTAL = 8**11 - 1  # larger sizes do not fit into a header in octal digits
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX_RECORD = re.compile(rb"(\d{1,9}) [^=]+=")

# What tarfile raises on damaged headers; not every field is checked before it is used.
_UNSOUND = (tarfile.TarError, ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError)


@dataclass(frozen=True)
class Damage:
    """A part of the file that is no sound archive; ``start`` and ``stop`` are its first byte and its last byte + 1."""

    start: int
    stop: int
    what: str


class Member(tarfile.TarInfo):
    """A member of an archive."""

    stored_size = 0  # the size in the header itself; extensions can replace it
    is_cut = False  # its data goes past the end of the file

    def _proc_member(self, archive: Any) -> Any:
        """Check what has no checksum, the names and attributes in front of a header, and go on as ``tarfile`` does."""
        archive.chain += 1
        if self.size < 0 or archive.chain > _MAX_CHAIN:
            raise tarfile.HeaderError("negative size" if self.size < 0 else "too many headers for one member")
        self.stored_size = self.size
        if self.type in (*_EXTENSIONS, *_LONG_NAMES):
            data = archive.fileobj.read(-(-self.size // BLOCK) * BLOCK)
            (_check_records if self.type in _EXTENSIONS else _check_name)(data[: self.size])
            archive.fileobj.seek(-len(data), 1)
        return super()._proc_member(archive)  # type: ignore[misc]

    @property
    def is_sparse(self) -> bool:
        """Whether holes of the file are left out of the archive."""
        return self.issparse() or any("GNU.sparse" in key or key == "SCHILY.realsize" for key in self.pax_headers)

    def check(self, following: int, end: int) -> None:
        """Raise ``HeaderError`` if the sizes contradict each other, or ``following``, the place of the next header."""
        if self.size < 0 or following < self.offset_data:
            raise tarfile.HeaderError("negative size")
        small = self.size <= _LARGEST_OCTAL and self.stored_size not in (0, self.size)
        padded = self.offset_data - (-self.size // BLOCK) * BLOCK
        if not self.is_sparse and self.isreg() and (small or following != padded):
            raise tarfile.HeaderError("the header and its extension have different sizes")
        self.is_cut = following > end and (self.offset_data + self.size > end or not self.isreg())


def _check_records(data: bytes) -> None:
    """Raise ``HeaderError`` if the records of a pax header do not fill it exactly."""
    position = 0
    while position < len(data):
        match = _PAX_RECORD.match(data, position)
        end = position + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise tarfile.HeaderError("damaged attributes")
        position = end


def _check_name(data: bytes) -> None:
    if len(data) < 2 or data.find(b"\0") != len(data) - 1:
        raise tarfile.HeaderError("damaged name")


class _Headers:
    """An open file that never returns less than it was asked for, except at its end, and never very much."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _MAX_EXTENSION:
            raise tarfile.HeaderError("names or attributes of an impossible size")
        data = self._file.read(count)
        if len(data) != count and count != BLOCK:
            raise tarfile.HeaderError("cut off")
        return data

    def seek(self, position: int, whence: int = 0) -> int:
        return self._file.seek(position, whence)

    def tell(self) -> int:
        return self._file.tell()


class Archive:
    """The members of the tar ``file``, which has ``size`` bytes. To ``TarInfo.fromtarfile`` it is a ``TarFile``."""

    encoding, errors = "utf-8", "surrogateescape"

    def __init__(self, file: BinaryIO, path: str, size: int) -> None:
        self.fileobj = _Headers(file)
        self.pax_headers: dict[str, str] = {}
        self.offset = 0  # of the next header; TarInfo sets it
        self.chain = 0
        self._file, self._path, self._size = file, path, size

    def members(self) -> Iterator[Member | Damage]:
        """Yield the members and the damaged parts in order. Raises ``SourceError`` if not one header is sound."""
        damage: Damage | None = None  # several in a row are one
        for part in self._parts():
            if isinstance(part, Damage):
                damage = Damage(damage.start, part.stop, damage.what) if damage else part
                continue
            if damage:
                yield damage
                damage = None
            yield part
        if damage:
            yield damage

    def _parts(self) -> Iterator[Member | Damage]:
        if not self._size:
            raise self._no_tar("it is empty (0 bytes)")
        start = position = 0  # of this archive (several can be joined), and of the next header
        sound = False
        while position < self._size:
            zeros = self._zeros_end(position)
            if zeros == self._size and zeros - position >= END:
                return
            resume = zeros // BLOCK * BLOCK
            if resume > position and self._is_joined(start, position, resume):
                self.pax_headers, start, position = {}, resume, resume
                continue
            what = "zeros instead of a header" if resume > position or zeros == self._size else None
            if what is None:
                member = self._member(position)
                if isinstance(member, Member):
                    sound = True
                    yield member
                    position = self._next_header(member.offset_data) if member.is_cut else self.offset
                    if member.is_cut and position == self._size:
                        return
                    continue
                what, resume = member
            resume = self._next_header(resume)
            if not sound and resume == self._size:
                raise self._no_tar("none of its headers is sound")
            yield Damage(position, resume, what)
            if resume == self._size:
                return
            position = resume
        yield Damage(self._size, self._size, "the end of the archive is missing")

    def _member(self, position: int) -> Member | tuple[str, int]:
        """Return the member at ``position``, or what is wrong with it and where to look for the next one."""
        self._file.seek(position)
        self.chain = 0
        try:
            member = Member.fromtarfile(self)  # type: ignore[arg-type]
            member.check(self.offset, self._size)
            return member
        except _UNSOUND as error:
            # What has been read is not read again, so that the time for a file of nothing but damage is bounded.
            return f"damaged header: {error}", max(self._file.tell(), position + BLOCK)

    def _zeros_end(self, position: int) -> int:
        """Return the position of the first byte from ``position`` on that is not zero, or the size of the file."""
        self._file.seek(position)
        length = BLOCK
        while data := self._file.read(length):
            rest = len(data.lstrip(b"\0"))
            if rest:
                return position + len(data) - rest
            position, length = position + len(data), _PIECE
        return self._size

    def _is_joined(self, start: int, position: int, following: int) -> bool:
        """Return True if the zeros from ``position`` on end the archive, and another one begins at ``following``."""
        padded = start - (-(position + END - start) // RECORD) * RECORD
        self._file.seek(following)
        return following == padded and self._is_header(self._file.read(BLOCK))

    def _next_header(self, position: int) -> int:
        """Return the position of the first sound header from ``position`` on, or the size of the file."""
        position = -(-position // BLOCK) * BLOCK
        self._file.seek(min(position, self._size))
        while len(data := self._file.read(_PIECE)) >= BLOCK:
            blocks = np.frombuffer(data, np.uint8, len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
            new = (blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(1)
            old = (blocks[:, 0] != 0) & ~blocks[:, 257:500].any(1)  # the format before POSIX has no magic number
            for index in np.flatnonzero(new | old):
                if self._is_header(blocks[index].tobytes()):
                    return position + int(index) * BLOCK
            position += len(data)
        return self._size

    def _is_header(self, block: bytes) -> bool:
        try:
            Member.frombuf(block, self.encoding, self.errors)
        except _UNSOUND:
            return False
        return block[257:262] == b"ustar" or not any(block[257:500])

    def _no_tar(self, reason: str) -> SourceError:
        return SourceError(
            f"{path_text(self._path)!r} cannot be read as a tar file: {reason}; pass an uncompressed tar file"
        )
