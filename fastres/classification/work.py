"""The work folder beside an output. It keeps finished rows until the run is complete, so that a run can be resumed.

``out.parquet.partial/`` holds ``manifest.json`` (settings and the list's sha256), ``listing.arrow`` and shards named by
their rows, such as ``rows-000000000000-000000000512.parquet``. Every file is written under a temporary name and renamed
when it is complete. A lock keeps other runs out; the system releases it when the process dies.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from fastres.errors import OutputError, ResumeError
from fastres.forks import Guard
from fastres.version import __version__

from .listing import difference
from .tables import FORMATS, Layout, merged, open_writer, write_shard

# A shard is closed when it has this many rows or is this old. This limits the memory used and the rows lost to a kill.
SHARD_ROWS, SHARD_SECONDS = 4096, 15.0
_SHARD = re.compile(r"rows-(\d{12})-(\d{12})\.parquet")

_active: set[Path] = set()  # fcntl locks belong to a process, so they do not exclude its other threads
_active_guard = Guard()


class Work:
    """The locked work folder of a run. :func:`open_work` creates it."""

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
        """The number of rows in finished shards, plus the rows that wait for the next shard."""
        return self.done + sum(batch.num_rows for batch in self._rows)

    def begin(self, settings: dict[str, Any], fingerprint: str) -> int:
        """Start a run or continue the interrupted one; return the number of errors in the finished rows.

        ``new_listing`` is the current list of the source, ``fingerprint`` its sha256. Raises ``ResumeError`` if the
        interrupted run had different ``settings`` or images, or if its shards are incomplete.
        """
        if self._manifest.exists():
            before = _read_manifest(self._manifest)
            if before["settings"] != settings:
                raise ResumeError(
                    f"{self._kept(before)} had different settings: {_changes(before['settings'], settings)}"
                )
            if before["fingerprint"] != fingerprint:
                changed = difference(self.listing, self.new_listing)
                raise ResumeError(f"{self._kept(before)} had different images: {changed}")
        os.replace(self.new_listing, self.listing)
        manifest = {"fastres": __version__, "settings": settings, "fingerprint": fingerprint}
        with self.writing(self._manifest) as path:
            path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
        shards = self._shards()
        self.done = shards[-1][1] if shards else 0
        return sum(_errors(path) for _, _, path in shards)

    def _kept(self, manifest: dict[str, Any]) -> str:
        return (
            f"{str(self.folder)!r} cannot be resumed (use --overwrite to start over, or another output to keep it): "
            f"its run with fastres {manifest['fastres']}"
        )

    def _shards(self) -> list[tuple[int, int, Path]]:
        """Return the finished shards. Raises ``ResumeError`` if one is missing."""
        shards = _finished(self.folder)
        for (_, stop, _), (start, _, path) in zip([(0, 0, self.folder), *shards], shards, strict=False):
            if stop != start:
                raise ResumeError(
                    f"{str(path)!r} follows row {stop}, so shards are missing; use --overwrite to start over"
                )
        return shards

    # -- rows ------------------------------------------------------------------------------------------------

    def add(self, rows: pa.RecordBatch) -> None:
        """Add rows; write a shard if enough rows are waiting, or if they have waited long enough."""
        self._rows.append(rows)
        waiting = self.rows - self.done
        if waiting >= SHARD_ROWS or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the waiting rows as a shard. If that raises ``OutputError``, they keep waiting."""
        stop = self.rows
        if stop > self.done:
            with self.writing(self.folder / f"rows-{self.done:012}-{stop:012}.parquet") as path:
                write_shard(self._rows, path)
        self.done, self._rows, self._since = stop, [], time.monotonic()

    def finish(self, layout: Layout, metadata: dict[str, Any]) -> None:
        """Join the shards into the output and delete the work folder. Raises ``OutputError`` if that fails."""
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
        """Yield a path in the work folder; the file is synced to disk and renamed to ``target`` if the block succeeds.

        Raises ``OutputError`` if the file cannot be written.
        """
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
        advice = "free some space there" if full else "fix the cause"
        reason = os.strerror(error.errno) if error.errno else error
        kept = f"The first {self.done:,} rows are kept in {str(self.folder)!r}; {advice}, then continue with --resume"
        return OutputError(f"{str(target)!r} cannot be written: {reason}. {kept if self.done else advice.capitalize()}")


@contextmanager
def open_work(output: Path, resume: bool, overwrite: bool) -> Iterator[Work]:
    """Create and lock the work folder of ``output``; delete it at the end if it has no finished shard.

    Raises ``OutputError`` if the output already exists (without ``overwrite``), another run is writing it, there is an
    interrupted run (without ``resume`` or ``overwrite``), or the folder cannot be written.
    """
    if output.suffix.lower() not in FORMATS:
        raise OutputError(f"The output is {str(output)!r}; use a name that ends in {', '.join(FORMATS)}")
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
        raise OutputError(f"{str(output)!r} is a folder; pass the name of a file")
    if output.exists() and not overwrite:
        raise OutputError(f"{str(output)!r} already exists; use another output, or --overwrite to replace it")
    shards = _finished(folder)
    if shards and not resume and not overwrite:
        raise OutputError(
            f"{str(folder)!r} has {shards[-1][1]:,} rows of an interrupted run; use --resume to continue it, or "
            "--overwrite to start over"
        )


def _finished(folder: Path) -> list[tuple[int, int, Path]]:
    """Return first row, last row + 1 and path of each finished shard, in order."""
    found = [(_SHARD.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), int(match[2]), path) for match, path in found if match)


def _remove_rows(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "lock":
            path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``. Raises ``OutputError`` if another run holds it."""
    place = folder.resolve()
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


def _lock_file(folder: Path) -> BinaryIO:
    """Create ``folder`` if needed, and return its lock file, open and locked until it is closed."""
    path = folder / "lock"
    try:
        folder.mkdir(exist_ok=True)
        file = path.open("ab+", buffering=0)
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be written: {error.strerror}; use another output") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            file.truncate(0)
            file.write(b"%d" % os.getpid())
            return file
        holder = "which has just finished"
    except FileNotFoundError:  # the run that held the lock has deleted the folder
        holder = "which has just finished"
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise OutputError(f"{str(path)!r} cannot be written: {error.strerror}; use another output") from error
        file.seek(0)
        holder = f"process {file.read().decode() or 'unknown'}"
    file.close()
    raise OutputError(f"Another run ({holder}) is writing {str(folder)!r}; wait for it, or use another output")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {key: manifest[key] for key in ("fastres", "settings", "fingerprint")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{str(path)!r} cannot be read ({error}); use --overwrite to start over") from error


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in names)


def _errors(shard: Path) -> int:
    try:
        column = pq.read_table(shard, columns=["error"])["error"]
    except (OSError, pa.ArrowException) as error:
        raise ResumeError(f"{str(shard)!r} cannot be read ({error}); use --overwrite to start over") from error
    return len(column) - column.null_count
