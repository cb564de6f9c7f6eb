"""Files: open regular ones only, write them atomically, and never write where an input is."""

from __future__ import annotations

import errno
import os
import select
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
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "a special file")


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


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a regular file; raises ``OSError`` as :func:`open_regular` does."""
    with open_regular(path) as file:
        return file.read()


def read_text_input(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a regular file, or of a pipe that a program is writing to, such as ``<(command)``.

    Raises ``OSError``. Nothing waits for ever: a pipe without a writer is empty, and a writer has ten seconds for each
    part of at most 64 MB.
    """
    if not stat.S_ISFIFO(os.stat(path).st_mode):
        return read_regular(path)
    content = b""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as pipe:
        while (part := pipe.read(1 << 16)) != b"":  # None: a writer has it open, and there is nothing to read yet
            if part is None and not select.select([pipe], [], [], 10)[0]:
                raise OSError(errno.ETIMEDOUT, "nothing came through the pipe for ten seconds", os.fspath(path))
            content += part or b""
            if len(content) > 1 << 26:
                raise OSError(errno.EFBIG, "more than 64 MB came through the pipe", os.fspath(path))
    return content


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
        out, name = os.fspath(output), os.fspath(given)
        if same:
            raise OutputError(f"The output {out!r} is the input {name!r}, which would be lost; use another output")
        if source.startswith(os.path.join(place, "")):
            raise OutputError(f"The output {out!r} holds the input {name!r}, which would be lost; use another output")


def refuse_unwritable(output: Path, example: str) -> None:
    """Raise ``OutputError`` unless a file can be written at ``output``. Call this before the work, not after it."""
    name = os.fspath(output)
    try:
        kind = other_kind(os.stat(output).st_mode)
    except FileNotFoundError:
        kind = None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"The output {name!r} cannot be written ({reason}); use another path") from error
    if kind is not None:
        raise OutputError(f"The output {name!r} is {kind}; use the name of a file, such as {example}")
    folder = output.parent
    if not folder.is_dir():
        raise OutputError(f"The output's folder {str(folder)!r} does not exist; create it, or use another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"The output's folder {str(folder)!r} cannot be written to; use a path in another folder")


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
