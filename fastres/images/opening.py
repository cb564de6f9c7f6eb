"""Open an image file, if it is a regular file, and name files in messages."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import BinaryIO

from fastres.errors import ImageError
from fastres.files import open_regular, other_kind

_ADVICE = "pass the path of an image file"


class NamedBytes(bytes):
    """The content of an image that is no local file; ``name`` is its name in messages."""

    name = ""

    @classmethod
    def of(cls, content: bytes, name: str) -> NamedBytes:
        """Return ``content`` with this name."""
        named_content = cls(content)
        named_content.name = name
        return named_content

    @property
    def label(self) -> str:
        """The name for a message. Raises ``ImageError`` if there is no content."""
        if not self:
            raise ImageError(f"{named(self.name)} is empty (0 bytes); {_ADVICE}.")
        return named(self.name)


def open_image(source: str | os.PathLike[str]) -> BinaryIO:
    """Open an image file for reading.

    Raises ``ImageError``, which names the file, if it is missing, empty, a folder or not a regular file, if it cannot
    be read, and if ``source`` is a URL. Nothing but a regular file is opened: a named pipe would wait for its writer.
    """
    name = os.fsdecode(source)
    if not name:
        raise ImageError(f"The path of the image is empty; {_ADVICE}.")
    label = named(name)
    try:
        facts = os.stat(name)
        if not facts.st_size and other_kind(facts.st_mode) is None:
            raise ImageError(f"{label} is empty (0 bytes); {_ADVICE}.")
        if (kind := other_kind(facts.st_mode)) == "a folder":
            raise ImageError(
                f"{label} is a folder; pass a list of its files, such as list(Path({label}).glob('*.jpg'))."
            )
        if kind is not None:
            raise ImageError(f"{label} is {kind}; {_ADVICE}.")
        return _Streamed(open_regular(name))  # type: ignore[arg-type]
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unopened(name, error) from error


class _Streamed(io.BufferedReader):
    """A file that hides its descriptor. libtiff would map it into memory, and die if the file then became shorter."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


def _unopened(name: str, error: OSError | ValueError) -> ImageError:
    label = named(name)
    if re.match(r"[a-z][a-z0-9+.-]+:/", name, re.IGNORECASE):
        return ImageError(f"{label} is a URL. fastres does not download images; download it first and pass its path.")
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return ImageError(f"{label} cannot be read: {getattr(error, 'strerror', None) or error}.")
    place = "" if os.path.isabs(name) else f" in {_here()}"
    return ImageError(f"{label} does not exist{place}; pass the path of an image file.")


def _here() -> str:
    try:
        return named(Path.cwd(), quoted=False)
    except OSError:
        return "the current folder, which does not exist either"


def named(path: str | bytes | os.PathLike[str], quoted: bool = True) -> str:
    r"""Return a path for a message: printable, on one line, with ``\xe9`` for a byte that is not UTF-8."""
    literal = re.sub(r"(?<!\\)((?:\\\\)*)\\udc([89a-f])", r"\1\\x\2", repr(os.fsdecode(path)))
    return literal if quoted else literal[1:-1]
