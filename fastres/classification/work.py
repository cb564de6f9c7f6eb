"""The rows of a run that are finished, in the work folder beside the output, so that a run can be resumed.

``out.parquet.partial/`` holds ``manifest.json`` (settings, and the sha256 of the list of images), ``listing.jsonl``
(the list) and parts. Every file is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fastres.errors import OutputError, ResumeError, ResumeWarning
from fastres.files import other_kind, read_regular
from fastres.terminal import progress_bar, warn
from fastres.version import __version__

from . import parts
from .folder import LISTING, MANIFEST, NEW_LISTING, OUTPUT, TEMPORARY, clear, locked, remove, remove_sidecar
from .formats import Writer, check_output_name, open_writer
from .listing import difference

_LONGEST_SETTING = 200  # characters that a message shows


class Work:
    """The locked work folder of a run. :func:`open_work` creates it."""

    def __init__(self, output: Path, folder: Path) -> None:
        self.output = output
        self.folder = folder
        self._resumed = 0  # rows in the parts of earlier runs
        self.gaps: list[range] = []  # rows that are still to be computed
        self.recomputed = 0  # rows to be computed again, because their parts were damaged or missing
        self.is_temporary = False  # it is deleted after the run, whatever happens
        self.complete = False  # the interrupted run had already written its output
        self._count = 0
        self._manifest: dict[str, Any] = {}
        self._run = ""
        self._written: list[int] = []  # the identity of the file written last
        self._writer: parts.PartWriter | None = None

    @property
    def done(self) -> int:
        """How many rows are in finished parts."""
        return self._resumed + (self._writer.written if self._writer else 0)

    @property
    def listing(self) -> Path:
        return self.folder / LISTING

    @property
    def advice(self) -> str:
        """How to go on with the rows that are kept."""
        replaces = " --overwrite" * self.output.exists()  # an earlier output is still there
        return f"continue with --resume{replaces}"

    @property
    def new_listing(self) -> Path:
        return self.folder / NEW_LISTING

    def begin(self, settings: dict[str, Any], fingerprint: str, count: int, progress: bool) -> int:
        """Start a run of ``count`` rows, or continue the interrupted one; return the errors in the finished rows.

        ``new_listing`` is the current list of the source, ``fingerprint`` its sha256. Raises ``ResumeError`` if the
        interrupted run had other ``settings`` or images. Warns of parts that are damaged: ``gaps`` has their rows.
        """
        self._count = count
        self._manifest = {"fastres": __version__, "settings": settings, "fingerprint": fingerprint}
        self._run = hashlib.sha256(json.dumps(self._manifest, sort_keys=True).encode()).hexdigest()
        before = self._check_manifest()
        if _has_finished(before, self.output):
            self.complete, self._resumed = True, count
            return int(before["errors"])
        self._writer = parts.PartWriter(self._run, self._write_part)
        kept = parts.check(self._parts(), range(count), count, self._run, self._read, progress)
        if kept.bad and not kept.slices and not before:
            raise ResumeError(
                f"{str(self.folder)!r} cannot be resumed: {MANIFEST} is missing or damaged, and its rows are not those "
                "of this run; use --overwrite to start over, or another output to keep them"
            )
        self._warn(kept, bool(before))
        try:
            os.replace(self.new_listing, self.listing)
            self._write_manifest()
            for part in kept.bad:
                (self.folder / part.name).unlink()
        except OSError as error:
            raise self._cannot_write(self.listing, error) from error
        self.gaps, self._resumed = kept.missing, kept.rows
        return kept.errors

    def _check_manifest(self) -> dict[str, Any]:
        """Return the interrupted run's manifest, or ``{}`` if it is missing or damaged.

        Raises ``ResumeError`` if the run differs from this one.
        """
        before = _read_manifest(self.folder)
        if not before:
            return {}
        kept = (
            f"{str(self.folder)!r} cannot be resumed (use --overwrite to start over, or another output to keep it): "
            f"its run with fastres {before['fastres']}"
        )
        if before["fastres"] != __version__:
            raise ResumeError(f"{kept} may compute other values than {__version__}, which is installed now")
        if before["settings"] != self._manifest["settings"]:
            raise ResumeError(
                f"{kept} had different settings: {changes(before['settings'], self._manifest['settings'])}"
            )
        if before["fingerprint"] != self._manifest["fingerprint"]:
            raise ResumeError(f"{kept} had different images: {difference(self.listing, self.new_listing)}")
        return before

    def _warn(self, kept: parts.Kept, described: bool) -> None:
        last = max((part.stop for part in [*(each.part for each in kept.slices), *kept.bad]), default=0)
        self.recomputed = sum(max(min(gap.stop, last) - gap.start, 0) for gap in kept.missing)
        if self.recomputed:
            names = ", ".join(part.name for part in kept.bad[:3]) or "missing parts"
            warn(
                f"{self.recomputed:,} rows in {str(self.folder)!r} are damaged or missing, and are computed again: "
                f"{names}",
                ResumeWarning,
            )
        elif kept.slices and not described:
            warn(
                f"{MANIFEST} in {str(self.folder)!r} is missing or damaged; the checksums show that the rows are those "
                "of this run",
                ResumeWarning,
            )

    def _write_manifest(self) -> None:
        with self.writing(self.folder / MANIFEST) as file:
            file.write(json.dumps(self._manifest, indent=1).encode())

    # -- rows ------------------------------------------------------------------------------------------------

    def add(self, start: int, rows: parts.Rows) -> None:
        """Add rows from number ``start`` on. Write a part if enough rows are waiting, or for long enough."""
        assert self._writer is not None
        self._writer.add(start, rows)

    def flush(self) -> None:
        """Write the waiting rows as a part. If that raises ``OutputError``, they keep waiting."""
        if self._writer is not None:
            self._writer.flush()

    def _write_part(self, name: str, content: bytes) -> None:
        with self.writing(self.folder / name) as file:
            file.write(content)

    def _parts(self) -> list[parts.Part]:
        return parts.named_parts(os.listdir(self.folder))

    def _read(self, name: str) -> bytes:
        return read_regular(self.folder / name)

    def finish(self, columns: Any, metadata: dict[str, Any], errors: int, progress: bool) -> None:
        """Join the parts into the output and delete the work folder. Raises ``OutputError`` if that fails."""
        self.flush()
        temporary = self.folder / OUTPUT
        try:
            with self.writing(temporary) as file, open_writer(
                file, self.output.suffix.lower(), columns, metadata
            ) as writer:  # fmt: skip
                self._join(writer, progress)
            # If the process is killed before the folder is gone, this tells the resumed run that the output is its own.
            written = self._written
            self._manifest |= {"finished": written, "errors": errors}
            self._write_manifest()
            remove_sidecar(self.output)
            os.replace(temporary, self.output)
            sync_folder(self.output.parent)
            if (_identity(self.output) or [])[:3] != written[:3]:  # some file systems round the time later
                raise ResumeError(f"{str(self.output)!r} is not what was written: another program has changed it")
        except ResumeError as error:
            raise OutputError(f"{error}; continue with --resume, which computes its rows again") from error
        except OSError as error:
            raise self._cannot_write(self.output, error) from error
        remove(self.folder)

    def discard(self) -> None:
        """Delete the work folder of a run that was complete already."""
        remove(self.folder)

    def _join(self, writer: Writer, progress: bool) -> None:
        found, missing = parts.cover(self._parts(), range(self._count))
        if missing:
            raise ResumeError(f"Rows {missing[0].start} to {missing[0].stop} in {str(self.folder)!r} have disappeared")
        with progress_bar(
            total=self._count, desc="Writing the table", unit="row", delay=1.0, disable=not progress
        ) as bar:
            for rows in parts.merged(found, self._run, self._read):
                writer.write_table(rows)
                bar.update(rows.num_rows)

    @contextmanager
    def writing(self, target: Path) -> Iterator[BinaryIO]:
        """Yield a new file in the work folder; it is synced to disk and renamed to ``target`` if the block succeeds.

        Raises ``OutputError`` if the file cannot be written.
        """
        temporary = self.folder / f"{target.name}{TEMPORARY}"
        try:
            with temporary.open("wb+") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                self._written = _facts(os.fstat(file.fileno()))
            os.replace(temporary, target)
            sync_folder(self.folder)
        except OutputError:
            raise
        except OSError as error:
            raise self._cannot_write(target, error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _cannot_write(self, target: Path, error: OSError) -> OutputError:
        if isinstance(error, OutputError):
            return error
        target = self.output if target.name == OUTPUT else target
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space there" if full else "fix the cause"
        reason = os.strerror(error.errno) if error.errno else error
        kept = f"{self.done:,} rows are kept in {str(self.folder)!r}; {advice}, then {self.advice}"
        is_kept = self.done and not self.is_temporary
        return OutputError(f"{str(target)!r} cannot be written: {reason}. {kept if is_kept else advice.capitalize()}")


@contextmanager
def open_work(output: Path, resume: bool, overwrite: bool) -> Iterator[Work]:
    """Create and lock the work folder of ``output``; delete it at the end if it has no finished part.

    Raises ``OutputError`` if the output already exists (without ``overwrite``), another run is writing it, there is an
    interrupted run (without ``resume`` or ``overwrite``), or the folder cannot be written or is not fastres's.
    """
    output = check_output(output, resume, overwrite)
    folder = work_folder(output)
    with locked(folder):
        try:
            check_output(output, resume, overwrite)  # another run may have finished or begun in between
            if not resume:
                _clear(folder)
            yield Work(output, folder)
        finally:
            _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    """Delete a work folder without parts. One that cannot be read stays, since an error is being raised already."""
    with suppress(OSError):
        if folder.is_dir() and not parts.named_parts(os.listdir(folder)):
            remove(folder)


def work_folder(output: Path) -> Path:
    """Return the folder in which the rows of ``output`` are kept until the run is complete."""
    return output.with_name(f"{output.name}.partial")


def check_output(output: Path, resume: bool, overwrite: bool) -> Path:
    """Return ``output``, or the file that it links to. Raises ``OutputError``; see :func:`open_work`."""
    check_output_name(str(output))
    try:
        if output.is_symlink():
            output = Path(os.path.realpath(output))
        kind = other_kind(output.stat().st_mode)
    except FileNotFoundError:
        kind = None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{str(output)!r} cannot be written: {reason}; use another output") from error
    if kind is not None:
        raise OutputError(f"{str(output)!r} is {kind}; pass the name of a file")
    _check_earlier_runs(output, work_folder(output), resume, overwrite)
    return output


def _clear(folder: Path) -> None:
    try:
        clear(folder)
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be emptied: {error.strerror}; use another output") from error


def _check_earlier_runs(output: Path, folder: Path, resume: bool, overwrite: bool) -> None:
    finished = resume and _has_finished(_read_manifest(folder), output)
    if output.exists() and not overwrite and not finished:
        raise OutputError(f"{str(output)!r} already exists; use another output, or --overwrite to replace it")
    if not overwrite and "shards" in _read_manifest(folder):
        raise OutputError(
            f"{str(folder)!r} has rows of a run in shards; continue it with --shard, and write the table with --join. "
            "Use --overwrite to start over without shards"
        )
    found = parts.named_parts(os.listdir(folder)) if folder.is_dir() else []
    if found and not resume and not overwrite:
        raise OutputError(
            f"{str(folder)!r} has {sum(part.rows for part in found):,} rows of an interrupted run; use --resume to "
            "continue it, or --overwrite to start over"
        )


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of the manifest in ``folder``, or ``{}`` if it is missing, damaged or unreadable."""
    try:
        manifest = json.loads(read_regular(folder / MANIFEST))
        kinds = {"fastres": str, "settings": dict, "fingerprint": str}
        if all(isinstance(manifest[key], kind) for key, kind in kinds.items()):
            return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return {}


def _has_finished(manifest: dict[str, Any], output: Path) -> bool:
    """Return True if the run with this manifest has written ``output``."""
    finished = manifest.get("finished")
    return finished is not None and finished == _identity(output) and isinstance(manifest.get("errors"), int)


def _identity(path: Path) -> list[int] | None:
    """Return numbers that tell a file from all others, also after it was renamed; ``None`` if there is none."""
    try:
        return _facts(path.stat())
    except OSError:
        return None


def _facts(facts: os.stat_result) -> list[int]:
    return [facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns]


def sync_folder(folder: Path) -> None:
    """Write the names in ``folder`` to disk, so that a power cut does not undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(descriptor)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in words which values differ."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(_change(name, repr(before.get(name)), repr(now.get(name))) for name in names)


def _change(name: str, before: str, now: str) -> str:
    if max(len(before), len(now)) > _LONGEST_SETTING:
        return f"{name} changed"
    return f"{name} was {before} and is now {now}"
