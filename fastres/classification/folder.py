"""The work folder beside an output: whose it is, its lock, and its removal.

fastres touches only files that it has written. A folder of that name with anything else in it is somebody's, and is
refused. A lock keeps other runs out; the system releases it when the process dies. The processes of a run in shards
share the lock, which keeps out runs of one process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fastres.errors import OutputError
from fastres.files import other_kind, read_regular
from fastres.forks import Guard
from fastres.terminal import warn

from .parts import is_part

LOCK, MANIFEST, LISTING, NEW_LISTING = "lock", "manifest.json", "listing.jsonl", "listing.new.jsonl"
OUTPUT = "output"  # the joined parts, before they get the output's name
SIDECAR = ".manifest.json"  # added to the output's name: what the output of a run in shards is, written last
TEMPORARY = ".tmp"  # ends the name of a file that is not complete
_EARLIER = ("listing.arrow", "listing.new.arrow")  # lists of earlier versions
_OWN = (LOCK, MANIFEST, LISTING, NEW_LISTING, OUTPUT, *_EARLIER)
# The list of images of a run in shards has its sha256 in its name.
_SHARED_LISTING = re.compile(r"listing-[0-9a-f]{64}\.(jsonl|arrow)")
_UNIQUE = re.compile(r"\.[0-9a-f]{12}$")  # in the names of temporary files that several processes may write at once

_PAUSES = (0.05, 0.2)  # seconds before a lock that another process has is tried again

_active: set[Path] = set()  # fcntl locks belong to a process, so they do not exclude its other threads
_active_guard = Guard()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create ``folder`` if needed, and hold its lock.

    Raises ``OutputError`` if it cannot be written, another run holds the lock, or the folder is somebody's.
    """
    place = Path(os.path.realpath(folder))
    with _active_guard:
        if place in _active:
            raise OutputError(f"Another run in this process is writing {str(folder)!r}; use another output")
        _active.add(place)
    try:
        with _lock_file(folder):
            yield
    finally:
        with _active_guard:
            _active.discard(place)


@contextmanager
def shared(folder: Path) -> Iterator[BinaryIO]:
    """Create ``folder`` if needed, and share its lock, a file, with other processes.

    On some network file systems there are no locks; then only the check of the folder's content is left. Raises
    ``OutputError`` as :func:`locked`.
    """
    with _lock_file(folder, fcntl.LOCK_SH) as lock:
        yield lock


def is_alone(lock: BinaryIO) -> bool:
    """Return True if no other process shares ``lock``, which is then kept from others."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _lock_file(folder: Path, kind: int = fcntl.LOCK_EX) -> BinaryIO:
    """Create ``folder`` if needed, and return its lock file, open and locked until it is closed."""
    for pause in (*_PAUSES, 0.0) if kind == fcntl.LOCK_SH else (0.0,):
        lock = _lock_or_holder(folder, kind)
        if not isinstance(lock, str):
            return lock
        time.sleep(pause)  # the other process may be one that deletes the folder, because nothing came of its run
    raise OutputError(f"Another run ({lock}) is writing {str(folder)!r}; wait for it, or use another output")


def _lock_or_holder(folder: Path, kind: int) -> BinaryIO | str:
    """Do what :func:`_lock_file` does, or return who has the lock."""
    path = folder / LOCK
    try:
        folder.mkdir(exist_ok=True)
        _refuse_foreign(folder)
        file = path.open("ab+", buffering=0)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be written: {error.strerror}; use another output") from error
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            file.truncate(0)
            file.write(b"%d" % os.getpid())
            return file
        holder = "which has just finished"
    except FileNotFoundError:  # the run that held the lock has deleted the folder
        holder = "which has just finished"
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP) and kind == fcntl.LOCK_SH:
            return file
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise OutputError(f"{str(path)!r} cannot be written: {error.strerror}; use another output") from error
        file.seek(0)
        holder = f"process {file.read(20).decode(errors='replace') or 'unknown'}"
    file.close()
    return holder


def _refuse_foreign(folder: Path) -> None:
    """Raise ``OutputError`` if ``folder`` holds anything that fastres has not written."""
    if folder.is_symlink():
        raise OutputError(
            f"{str(folder)!r} is a link, but fastres keeps finished rows there; remove it, or use another output"
        )
    kinds = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # another process has just renamed it
                kinds[entry.name] = other_kind(entry.stat(follow_symlinks=False).st_mode)
    foreign = sorted(name for name, kind in kinds.items() if kind or not is_own(name))
    # A folder of ours has a lock from its first moment. Without it, parts show that it is ours: people write none.
    if not foreign and kinds and LOCK not in kinds and not any(map(is_part, kinds)):
        foreign = sorted(kinds)
    if foreign:
        raise OutputError(
            f"{str(folder)!r}, where fastres keeps finished rows, holds {foreign[0]!r}, which fastres has not written; "
            "move it away, or use another output"
        )


def is_own(name: str) -> bool:
    """Return True if a file in a work folder has a name that fastres gives."""
    if name.endswith(TEMPORARY):
        name = _UNIQUE.sub("", name.removesuffix(TEMPORARY))
    return name in _OWN or is_part(name) or _SHARED_LISTING.fullmatch(name) is not None


def sidecar_document(content: bytes) -> dict[str, Any] | None:
    """Return what the manifest beside an output says, or ``None`` if it is not fastres's."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) and {"fastres", "run", "sha256"} <= document.keys() else None


def remove_sidecar(output: Path) -> None:
    """Delete the manifest beside an output, which is about to be replaced, if it is fastres's. Raises ``OSError``."""
    sidecar = output.with_name(output.name + SIDECAR)
    with suppress(FileNotFoundError):
        if sidecar_document(read_regular(sidecar)) is not None:
            sidecar.unlink()


def clear(folder: Path) -> None:
    """Delete what fastres has written in ``folder``, except for the lock: the manifest last."""
    names = [name for name in os.listdir(folder) if is_own(name) and name != LOCK]
    for name in sorted(names, key=lambda name: name == MANIFEST):
        (folder / name).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Delete what fastres has written in ``folder``, and the folder itself. Warn if it holds somebody's file."""
    try:
        clear(folder)
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        foreign = [name for name in os.listdir(folder) if not is_own(name)] if folder.is_dir() else []
        if foreign:
            reason = f"holds {foreign[0]!r}, which fastres has not written"
        elif error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another run has already begun there
            return
        else:
            reason = f"cannot be deleted: {error.strerror}"
        warn(f"{str(folder)!r} is left behind, because it {reason}", UserWarning)
