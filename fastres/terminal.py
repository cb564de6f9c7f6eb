"""Standard output and standard error of programs; progress bars and warnings, which may have no place to go.

Python sets ``sys.stderr`` and ``sys.stdout`` to ``None`` in daemons and under ``pythonw``. Wrappers close them, or
replace them by objects that have only ``write``. A disk can be full, and a terminal can vanish. Progress bars and
warnings never fail because of that: what cannot be shown is left out. The result that a command prints is different.
If standard output cannot take it, the command fails (:class:`OutputStreamError`).
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from .text import path_text

if TYPE_CHECKING:
    from tqdm import tqdm

_files: ContextVar[list[str] | None] = ContextVar("files that the running program has written", default=None)


class OutputStreamError(Exception):
    """Standard output does not take what a program prints. ``broken_pipe`` means that its reader has ended.

    This is no ``OSError``, so that nobody takes it for the error of a file.
    """

    def __init__(self, reason: str, broken_pipe: bool = False) -> None:
        complete = "".join(f"; {name} is complete" for name in _files.get() or ())
        super().__init__(reason + complete)
        self.broken_pipe = broken_pipe


_USUAL_WIDTH = 120
CLOSED = "standard output is closed, so the result cannot be shown; redirect it to a file or a pipe"


def is_usable(stream: Any) -> bool:
    """Return True if text can be written to ``stream``."""
    return hasattr(stream, "write") and not getattr(stream, "closed", False)


def is_terminal(stream: Any) -> bool:
    """Return True if ``stream`` is a terminal; False if it is something else, is closed or is ``None``."""
    try:
        return is_usable(stream) and bool(stream.isatty())
    except (AttributeError, ValueError, OSError):
        return False


def terminal_width() -> int:
    """Return how many characters fit into a line of the terminal, or a usual number if there is none."""
    return shutil.get_terminal_size((_USUAL_WIDTH, 24)).columns


class _Stream:
    """A stream that escapes characters that its encoding lacks; ``encoding``, ``fileno`` and so on are the stream's."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def closed(self) -> bool:
        return not is_usable(self._stream)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        if hasattr(self._stream, "flush"):
            self._stream.flush()

    def settle(self) -> None:
        """Flush. Send to nowhere what cannot be written, so that Python's flush at its end cannot fail."""
        try:
            self._stream.flush()
        except (OSError, ValueError, AttributeError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


class _Messages(_Stream):
    """Standard error: what cannot be written is left out."""

    def write(self, text: str) -> int:
        if not self.closed:
            with contextlib.suppress(OSError, ValueError):
                super().write(text)
        return len(text)

    def flush(self) -> None:
        if not self.closed:
            with contextlib.suppress(OSError, ValueError):
                super().flush()


class Results(_Stream):
    """Standard output: ``OutputStreamError`` if it takes no text. ``lost`` means that it is closed and text came."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.lost = False

    def write(self, text: str) -> int:
        if self.closed:
            self.lost = self.lost or bool(text)
            return len(text)
        with _named():
            return super().write(text)

    def flush(self) -> None:
        if not self.closed:
            with _named():
                super().flush()

    def check(self) -> None:
        """Raise ``OutputStreamError`` if text was lost. On a closed stream, it may be if there is a file (`wrote`)."""
        self.flush()
        if self.lost and not _files.get():
            raise OutputStreamError(CLOSED)


@contextlib.contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        broken = isinstance(error, BrokenPipeError)
        raise OutputStreamError(f"standard output cannot be written: {reason}", broken) from error


@contextlib.contextmanager
def program_streams(owner: bool) -> Iterator[Results]:
    """Replace ``sys.stdout`` and ``sys.stderr`` within the context; yield the former.

    ``owner`` means that the process ends afterwards. Python's last flush is then made to succeed.
    """
    if owner:
        _occupy_standard_files()
    given = sys.stdout, sys.stderr
    results, messages = Results(sys.stdout), _Messages(sys.stderr)
    sys.stdout, sys.stderr = results, messages
    known = _files.set([])
    try:
        yield results
    finally:
        for stream in (results, messages) if owner else ():
            stream.settle()
        _files.reset(known)
        sys.stdout, sys.stderr = given


def _occupy_standard_files() -> None:
    """Open what is closed of the files 0, 1 and 2, so that no other file gets their number, and messages with it."""
    with contextlib.suppress(OSError):
        while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # takes the lowest free number
            pass
        os.close(number)


def wrote(*paths: str | os.PathLike[str]) -> None:
    """Note that the running program has written these files completely, for messages."""
    if (files := _files.get()) is not None:
        files += map(path_text, paths)


def files_written() -> tuple[str, ...]:
    """Return the names of the files that the running program has written (:func:`wrote`)."""
    return tuple(_files.get() or ())


def say(text: str) -> None:
    """Print a message on standard error, if that takes it."""
    messages = _Messages(sys.stderr)
    messages.write(f"{text}\n")
    messages.flush()


def json_text(document: Any, indent: int | None = 2) -> str:
    """Return ``document`` as JSON that standard output can show: in ASCII unless it takes UTF-8."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return json.dumps(document, indent=indent, ensure_ascii=codecs.lookup(encoding).name != "utf-8")


def progress_bar(iterable: Iterable[Any] | None = None, *, disable: bool | None = False, **options: Any) -> tqdm[Any]:
    """Return a ``tqdm`` on standard error with these ``options``. It shows nothing if that cannot be written.

    With ``disable=None`` it is shown only on a terminal.
    """
    from tqdm import tqdm

    hidden = not is_terminal(sys.stderr) if disable is None else disable
    hidden = hidden or not is_usable(sys.stderr)
    return tqdm(iterable, disable=hidden, file=None if hidden else _Messages(sys.stderr), **options)


def warn(message: str, category: type[Warning], stacklevel: int = 1) -> None:
    """Do what ``warnings.warn`` does, which fails if standard error is closed."""
    with usable_messages():
        warnings.warn(message, category, stacklevel=stacklevel + 1)


@contextlib.contextmanager
def usable_messages() -> Iterator[None]:
    """Within the context, leave out what cannot be written to standard error."""
    with contextlib.redirect_stderr(_Messages(sys.stderr)):
        yield
