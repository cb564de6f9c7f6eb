"""Write files and folders completely or not at all, with errors that give the reason if this fails."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastres.errors import FastresError
from fastres.files import other_kind, refuse_inputs, written_whole
from fastres.text import path_text
from fastres.weights.sources import input_files

from .errors import ExportFileError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary file next to ``path``, which replaces ``path`` if the block ends without an error.

    Otherwise the temporary file is removed, and an existing file at ``path`` stays as it was. A symbolic link is
    followed, and an existing file's permissions are kept. Raises ``ExportFileError`` if the folder is missing or cannot
    be written to, if ``path`` is a folder, or if the disk is full.
    """
    target = checked_target(path, utf8=False)
    with _naming(target), written_whole(target) as temporary:
        temporary.touch(exist_ok=False)
        if target.exists():
            shutil.copymode(target, temporary)
        yield temporary


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder next to ``path``, which replaces ``path`` if the block ends without an error.

    An existing folder at ``path`` is moved aside first and removed last. Raises ``ExportFileError`` as
    :func:`replacing` does, and if ``path`` is a file.
    """
    target = checked_folder(path)
    mark = uuid.uuid4().hex[:12]
    temporary, old = (target.with_name(f".{target.name}.{mark}.{kind}") for kind in ("tmp", "old"))
    with _naming(target):
        temporary.mkdir()
    try:
        with _naming(target):
            yield temporary
            if target.exists():
                os.replace(target, old)
            try:
                os.replace(temporary, target)
            except OSError:
                if old.exists():
                    os.replace(old, target)
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def checked_target(path: str | os.PathLike[str], *inputs: object, utf8: bool = True) -> Path:
    """Return ``path`` with links followed. Raise ``ExportFileError`` if a file cannot be written there.

    ``inputs`` are the model, its weights and whatever else is read, in any form. Raises ``OutputError`` if ``path`` is
    one of their files. ``utf8`` refuses names that onnx does not take.
    """
    target = _resolved(path)
    if utf8:
        _check_name(target)
    if target.is_dir():
        raise ExportFileError(f"{target} is a folder; give the path of the file to write, such as {target / 'model'}")
    _check_parent(target)
    try:
        kind = other_kind(target.stat().st_mode)
    except OSError:
        kind = None
    if kind is not None:
        raise ExportFileError(f"{target} is {kind}, not a regular file; give another path")
    refuse_inputs(target, input_files(*inputs))
    return target


def checked_folder(path: str | os.PathLike[str], *inputs: object) -> Path:
    """Return ``path`` with links followed. Raise ``ExportFileError`` if a model's folder cannot be written there.

    A folder that holds something else is not replaced. Raises ``OutputError`` if it holds one of the ``inputs``.
    """
    target = _resolved(path)
    _check_name(target)
    if target.exists() and not target.is_dir():
        raise ExportFileError(f"{target} is a file; give another folder, or remove it")
    refuse_inputs(target, input_files(*inputs))
    root = target.parent
    if root.exists() and not root.is_dir():
        raise ExportFileError(f"{root} is a file; give another folder, or remove it")
    _check_parent(target if root.is_dir() else root)
    with _naming(target):
        if target.is_dir() and any(target.iterdir()) and not (target / "config.pbtxt").is_file():
            raise ExportFileError(f"{target} holds something other than a server's model; give another folder")
    return target


def _resolved(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, a loop of links, an unknown user's home
        raise ExportFileError(f"{os.fspath(path)!r} is not a path that can be written: {error}") from error


def _check_name(target: Path) -> None:
    try:
        os.fsencode(target).decode()
    except UnicodeDecodeError:
        raise ExportFileError(
            f"{path_text(target)} is not a name in UTF-8, and onnx takes no other; give another path"
        ) from None


def _check_parent(target: Path) -> None:
    if not target.parent.is_dir():
        raise ExportFileError(f"The folder {target.parent} does not exist; create it first, or give another path")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ExportFileError(f"The folder {target.parent} cannot be written to; give a path in another folder")


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Turn the system's errors into an ``ExportFileError`` that names the file to be written."""
    try:
        yield
    except FastresError:  # some are also OSErrors, and already say what is wrong
        raise
    except OSError as error:
        raise ExportFileError(
            f"{target} cannot be written ({error.strerror or error}); free some space or give another path"
        ) from error
