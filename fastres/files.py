"""Files: open regular ones only, write them atomically, and never write where an input is."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError

_KINDS = {
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def other_kind(mode: int) -> str | None:
    """Return what a file with this ``st_mode`` is (``"a named pipe (FIFO)"``), or ``None`` for a regular file."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "not a regular file")


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading, unbuffered.

    Anything else is refused at once. Opening a named pipe would wait for its writer, and opening a device can have
    effects. Raises ``OSError``.
    """
    _refuse_other_kinds(path, os.stat(path))
    file = open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0)  # noqa: SIM115
    try:
        _refuse_other_kinds(path, os.fstat(file.fileno()))  # it may have been replaced in between
    except OSError:
        file.close()
        raise
    return file


def _refuse_other_kinds(path: str | os.PathLike[str], facts: os.stat_result) -> None:
    if (kind := other_kind(facts.st_mode)) is not None:
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", os.fspath(path))


def refuse_inputs(output: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Raise ``OutputError`` if ``output`` is one of the ``inputs``, by any name, or a folder that holds one of them.

    An input may be a folder that holds the output. Inputs and outputs that do not exist are compared by their names.
    """
    place = os.path.realpath(output)
    for given in inputs:
        source = os.path.realpath(given)
        try:
            same = os.path.samefile(place, source)
        except OSError:
            same = place == source
        if same or source.startswith(os.path.join(place, "")):
            verb = "is" if same else "holds"
            raise OutputError(
                f"The output {os.fspath(output)!r} {verb} the input {os.fspath(given)!r}, which would be lost; use "
                "another output"
            )


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; the file written there replaces ``path`` if the block succeeds.

    If the block raises, the temporary file is deleted and an existing file at ``path`` stays unchanged. An ``OSError``
    is passed on as it is; the caller turns it into a named error.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
