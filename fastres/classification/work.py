"""The work folder beside an output: finished rows are kept there until all are, so that a run can end at any moment.

``out.parquet.partial/`` holds ``manifest.json`` (settings and the list's sha256), ``listing.arrow`` and shards named by
the rows in them, ``rows-000000000000-000000000512.parquet``. Every file is written under another name and renamed when
it is whole. A lock, which the system takes back from a dead process, keeps other runs away.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from fastres.errors import OutputError, ResumeError
from fastres.version import __version__

from .listing import difference
from .tables import FORMATS, Layout, merged, open_writer, write_shard

# A shard is closed when it has this many rows or is this old: what a kill can cost, and what is held in memory.
SHARD_ROWS, SHARD_SECONDS = 4096, 15.0
_SHARD = re.compile(r"rows-(\d{12})-(\d{12})\.parquet")

_active: set[Path] = set()  # fcntl's locks are one process's: they do not keep its threads from each other
_active_guard = threading.Lock()


class Work:
    """One run's work folder, locked. :func:`open_work` makes it."""

    def __init__(self, output: Path, folder: Path) -> None:
        self.output = output
        self.folder = folder
        self.done = 0  # rows in finished shards
        self._rows: list[pa.RecordBatch] = []
        self._since = time.monotonic()

    @property
    def listing(self) -> Path:
        return self.folder / "listing.arrow"

    @property
    def new_listing(self) -> Path:
        return self.folder / "listing.new.arrow"

    @property
    def _manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def rows(self) -> int:
        """Rows that are there: in finished shards and waiting for the next one."""
        return self.done + sum(batch.num_rows for batch in self._rows)

    def begin(self, settings: dict[str, Any], fingerprint: str) -> int:
        """Start, or go on where the last run ended; returns how many errors the finished rows have.

        ``new_listing`` is the source's list as it is now, ``fingerprint`` its sha256. Raises ``ResumeError`` where a
        run to go on with had other ``settings`` or saw other images, or its shards are not whole.
        """
        if self._manifest.exists():
            before = _read_manifest(self._manifest)
            if before["settings"] != settings:
                raise ResumeError(f"{self._kept(before)} had other settings: {_changes(before['settings'], settings)}")
            if before["fingerprint"] != fingerprint:
                changed = difference(self.listing, self.new_listing)
                raise ResumeError(f"{self._kept(before)} saw other images: {changed}")
        os.replace(self.new_listing, self.listing)
        manifest = {"fastres": __version__, "settings": settings, "fingerprint": fingerprint}
        with self.writing(self._manifest) as path:
            path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
        shards = self._shards()
        self.done = shards[-1][1] if shards else 0
        return sum(_errors(path) for _, _, path in shards)

    def _kept(self, manifest: dict[str, Any]) -> str:
        return (
            f"{str(self.folder)!r} cannot be resumed (--overwrite starts over, another output keeps it): "
            f"its run with fastres {manifest['fastres']}"
        )

    def _shards(self) -> list[tuple[int, int, Path]]:
        """The finished shards. Raises ``ResumeError`` where one is missing."""
        shards = _finished(self.folder)
        for (_, stop, _), (start, _, path) in zip([(0, 0, self.folder), *shards], shards, strict=False):
            if stop != start:
                raise ResumeError(f"{str(path)!r} follows row {stop}: shards are missing; --overwrite starts over")
        return shards

    # -- rows ------------------------------------------------------------------------------------------------

    def add(self, rows: pa.RecordBatch) -> None:
        """Keep more rows; a shard is written when there are enough of them, or they have waited long enough."""
        self._rows.append(rows)
        waiting = self.rows - self.done
        if waiting >= SHARD_ROWS or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the waiting rows as a shard. Raises ``OutputError``; they stay waiting."""
        stop = self.rows
        if stop > self.done:
            with self.writing(self.folder / f"rows-{self.done:012}-{stop:012}.parquet") as path:
                write_shard(self._rows, path)
        self.done, self._rows, self._since = stop, [], time.monotonic()

    def finish(self, layout: Layout, metadata: dict[str, Any]) -> None:
        """Put the shards together as the output, and remove the work folder. Raises ``OutputError``."""
        self.flush()
        shards = [path for _, _, path in self._shards()]
        with self.writing(self.output) as path, open_writer(
            path, self.output.suffix.lower(), layout.schema, metadata
        ) as writer:  # fmt: skip
            for table in merged(shards):
                writer.write_table(table)
        shutil.rmtree(self.folder)

    @contextmanager
    def writing(self, target: Path) -> Iterator[Path]:
        """A path in the work folder that becomes ``target`` when the block is left, on the disk and whole."""
        temporary = self.folder / f"{target.name}.tmp"
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._cannot_write(target, error) from error

    def _cannot_write(self, target: Path, error: OSError) -> OutputError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "make room there" if full else "see to it"
        reason = os.strerror(error.errno) if error.errno else error
        kept = f"The first {self.done:,} rows are kept in {str(self.folder)!r}; {advice}, then --resume goes on"
        return OutputError(f"{str(target)!r} cannot be written: {reason}. {kept if self.done else advice.capitalize()}")


@contextmanager
def open_work(output: Path, resume: bool, overwrite: bool) -> Iterator[Work]:
    """Lock and make the work folder of ``output``; one in which nothing was finished is removed in the end.

    Raises ``OutputError`` where the output exists already (and not ``overwrite``), another run is writing it, there is
    an interrupted run (and neither ``resume`` nor ``overwrite``), or the folder cannot be written.
    """
    if output.suffix.lower() not in FORMATS:
        raise OutputError(f"The output is {str(output)!r}; its name must end in {', '.join(FORMATS)}")
    folder = output.with_name(f"{output.name}.partial")
    with _locked(folder):
        try:
            _check(output, folder, resume, overwrite)
            if not resume:
                _remove_rows(folder)
            yield Work(output, folder)
        finally:
            if folder.exists() and not _finished(folder):
                shutil.rmtree(folder)


def _check(output: Path, folder: Path, resume: bool, overwrite: bool) -> None:
    if output.is_dir():
        raise OutputError(f"{str(output)!r} is a folder; give the name of a file")
    if output.exists() and not overwrite:
        raise OutputError(f"{str(output)!r} exists already; give another output, or --overwrite to replace it")
    shards = _finished(folder)
    if shards and not resume and not overwrite:
        raise OutputError(
            f"{str(folder)!r} has {shards[-1][1]:,} rows of an interrupted run; --resume goes on, "
            "--overwrite starts over"
        )


def _finished(folder: Path) -> list[tuple[int, int, Path]]:
    """First row, last row + 1 and path of each finished shard, in order."""
    found = [(_SHARD.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), int(match[2]), path) for match, path in found if match)


def _remove_rows(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "lock":
            path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold ``folder``'s lock. Raises ``OutputError`` where another run has it."""
    place = folder.resolve()
    with _active_guard:
        if place in _active:
            raise OutputError(f"Another run in this process is writing {str(folder)!r}; give another output")
        _active.add(place)
    try:
        with _lock_file(folder):
            yield
    finally:
        with _active_guard:
            _active.discard(place)


def _lock_file(folder: Path) -> BinaryIO:
    """The lock's file in ``folder`` (which is made if needed), open and locked until it is closed."""
    path = folder / "lock"
    try:
        folder.mkdir(exist_ok=True)
        file = path.open("ab+", buffering=0)
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be written: {error.strerror}; give another output") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            file.truncate(0)
            file.write(b"%d" % os.getpid())
            return file
        holder = "which has just finished"
    except FileNotFoundError:  # the folder went with the run that held it
        holder = "which has just finished"
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise OutputError(f"{str(path)!r} cannot be written: {error.strerror}; give another output") from error
        file.seek(0)
        holder = f"process {file.read().decode() or 'unknown'}"
    file.close()
    raise OutputError(f"Another run ({holder}) writes {str(folder)!r}; look at its output, or give another one")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {key: manifest[key] for key in ("fastres", "settings", "fingerprint")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{str(path)!r} cannot be read ({error}); --overwrite starts over") from error


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)


def _errors(shard: Path) -> int:
    try:
        column = pq.read_table(shard, columns=["error"])["error"]
    except (OSError, pa.ArrowException) as error:
        raise ResumeError(f"{str(shard)!r} cannot be read ({error}); --overwrite starts over") from error
    return len(column) - column.null_count
