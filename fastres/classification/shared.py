"""A run that several processes do together: opening it, and computing some of its rows.

The first process to come lists the images and writes the manifest. All others take both from the work folder. Each
computes the rows that it is asked for, except those that somebody has already finished. Any process may die, come twice
or come late: rows are finished when their part has its name, and the same rows always have the same bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from fastres.errors import FastresError, ImageError, OutputError, ResumeError, ResumeWarning, SourceError
from fastres.model.model import Model
from fastres.storage.urls import is_url
from fastres.terminal import say, warn
from fastres.text import path_text
from fastres.version import __version__

from . import parts
from .folder import MANIFEST
from .job import ClassifyJob
from .listing import create_listing, difference
from .manifests import Manifest, encoded_schema, refuse_changes, refuse_earlier_form
from .places import Place
from .report import Report
from .requests import Request
from .run import compute, rows_bar
from .shards import Shard
from .sources import FileImages, Found, Images, find, opened, path_or_error

_PROBES = 4  # images that are looked for before a shard begins
Tell = Callable[[int, int], None]  # called with the numbers of rows and of errors that have been added


class RunFinishedError(Exception):
    """Another process has completed the output of this run meanwhile. ``manifest`` is the one beside it."""

    def __init__(self, manifest: dict[str, Any]) -> None:
        super().__init__("the output is complete")
        self.manifest = manifest


@dataclass(frozen=True)
class Done:
    """Rows of a run that are finished: ``errors`` of them have an error, and ``resumed`` of them were there before."""

    rows: int
    errors: int
    resumed: int
    recomputed: int


class SharedRun:
    """An open run, in one of its processes. :func:`open_run` makes it."""

    def __init__(self, place: Place, manifest: Manifest, images: Images, job: ClassifyJob) -> None:
        self.place, self.manifest = place, manifest
        self._images, self._job = images, job

    def kept(self, rows: range, progress: bool = False) -> parts.Kept:
        """Return which of ``rows`` are finished. Their parts are read and checked."""
        named = parts.named_parts(self.place.names())
        return parts.check(named, rows, self.manifest.images, self.manifest.run, self.place.read, progress)

    def warn_of_damage(self, kept: parts.Kept, rows: range) -> int:
        """Warn of those of ``rows`` that must be computed again, because their parts are damaged; return how many."""
        bad = {row for part in kept.bad for row in range(max(part.start, rows.start), min(part.stop, rows.stop))}
        count = sum(row in bad for gap in kept.missing for row in gap) if bad else 0
        if count:
            names = ", ".join(part.name for part in kept.bad[:3])
            warn(f"{count:,} rows in {self.place.folder!r} are damaged, and are computed again: {names}", ResumeWarning)
        return count

    def compute(self, rows: range, tell: Tell, progress: bool = False) -> Done:
        """Compute those of ``rows`` that are not finished. ``tell`` also gets those that are, first of all.

        Raises ``RunFinishedError`` if the output was completed meanwhile, and the errors of ``fastres.classify``.
        """
        with unless_finished(self.place, self.manifest.run):
            self._end_if_finished()
            kept = self.kept(rows, progress)
            if kept.bad:  # or have they just been deleted, because the output is complete?
                self._end_if_finished()
            recomputed = self.warn_of_damage(kept, rows)
            tell(kept.rows, kept.errors)
            _refuse_other_files(self._images, kept.missing)
            share = _Share(kept.missing, self.manifest.run, self.place)
            errors = compute(self._job, self._images, share, len(rows), tell) if kept.missing else 0
            share.flush()
            self._end_if_finished(share.names)
            return Done(len(rows), kept.errors + errors, kept.rows, recomputed)

    def _end_if_finished(self, written: Iterable[str] = ()) -> None:
        """Raise ``RunFinishedError`` if somebody has completed the output, and delete what was ``written`` too late."""
        if end := finished_run(self.place, self.manifest.run):
            self.place.delete(written)
            raise end


def _refuse_other_files(images: Images, gaps: list[range]) -> None:
    """Raise ``SourceError`` if this machine has none of the listed image files, or others under their names.

    All of them would become errors in the table.
    """
    if not isinstance(images, FileImages):
        return  # a missing or another tar or Parquet file is an error by itself
    probes = [rows[index * len(rows) // _PROBES] for rows in gaps[:_PROBES] for index in range(_PROBES)]
    entries = [images.listing.rows(row, row + 1)[0] for row in sorted(set(probes))]
    local = [entry for entry in entries if entry["error"] is None and not is_url(os.fsdecode(entry["path"]))]
    found = [path_or_error(entry) for entry in local]
    if len(local) < _PROBES or not all(isinstance(each, ImageError) for each in found):
        return
    first = path_text(local[0]["path"])
    if not any(os.path.lexists(entry["path"]) for entry in local):
        raise SourceError(
            f"This machine does not have the images that were listed, such as {first!r}. Give it the same file system "
            "under the same name, or start it in the same folder if the source is relative"
        )
    raise SourceError(
        f"The images on this machine are not those that were listed, such as {first!r}: {found[0]} Copies need the "
        "modification times of the originals (cp -p, rsync -a). If the images have changed, start over with --overwrite"
    )


class _Share:
    """The rows that this process computes, as :func:`fastres.classification.run.compute` wants them."""

    is_temporary = False

    def __init__(self, gaps: list[range], run: str, place: Place) -> None:
        self.gaps, self.folder, self.names = gaps, place.folder, list[str]()
        self.advice = f"{place.again} to go on"
        self._place, self._writer = place, parts.PartWriter(run, self._write)
        self.add, self.flush = self._writer.add, self._writer.flush

    def _write(self, name: str, content: bytes) -> None:
        self._place.write(name, content)
        self.names.append(name)

    @property
    def done(self) -> int:
        return self._writer.written


def missing_rows(place: Place, images: int) -> list[range]:
    """Return the rows, of ``images``, that are in no part, going by the names of the parts."""
    return parts.cover(parts.named_parts(place.names()), range(images))[1]


@contextmanager
def unless_finished(place: Place, run: str) -> Iterator[None]:
    """If the block fails after somebody has completed the output of ``run``, raise ``RunFinishedError``."""
    try:
        yield
    except (FastresError, OSError) as error:
        if end := finished_run(place, run):
            raise end from error
        raise


def finished_run(place: Place, run: str) -> RunFinishedError | None:
    """Return ``RunFinishedError``, to be raised, if somebody has completed the output of ``run``."""
    finished = place.finished()
    return RunFinishedError(finished) if finished.get("run") == run else None


@contextmanager
def open_run(
    request: Request,
    place: Place,
    *,
    model: Model | None = None,
    shards: int = 0,
    expected: str | None = None,
    list_again: bool = False,
    progress: bool = False,
) -> Iterator[SharedRun]:
    """Open the run of ``request`` in ``place``; begin it if nobody has. ``shards`` is how many the user asked for.
    ``model`` is that of the request, if it is loaded already.

    If ``expected`` is given, it is the ``Manifest.run`` that must be there. If ``list_again``, list the images also if
    the run has begun, and raise ``ResumeError`` if they have changed.

    Raises ``RunFinishedError`` if the output is complete, ``ResumeError`` if the run has other settings, and the errors
    of ``fastres.classify``.
    """
    model = model or request.opened_model()
    with place.opened():
        manifest = Manifest.of(place.manifest(), place.folder)
        if expected is not None and (manifest is None or manifest.run != expected):
            raise _not_there(place, expected)
        if manifest is not None:
            refuse_earlier_form(manifest, place.suffix, place.folder)
        if manifest is None and not place.replaces:
            refuse_finished(request, place)  # again, because the output may have been completed in between
        if manifest is None or list_again:
            job = request.job(model, manifest.batch_size if manifest else None)
            _begin(request, job, place, shards, list_again, progress)
            manifest = Manifest.of(place.manifest(), place.folder)
            if manifest is None:
                raise OutputError(f"{MANIFEST!r} in {place.folder!r} has disappeared; run the command again")
        elif progress:
            say(f"fastres: {place.folder}: {manifest.images:,} images, listed at {manifest.listed}")
        job = request.job(model, manifest.batch_size)
        found = Found(manifest.kind, (), tuple(manifest.source))
        with unless_finished(place, manifest.run):
            images = opened(found, place.listing(manifest.listing), manifest.image_column, manifest.columns)
            _, settings = job.begin(images)
        now = {"source": request.source_texts, **settings, "batch_size": job.batch_size}
        refuse_changes(manifest, now, place.folder)
        yield SharedRun(place, manifest, images, job)


def _not_there(place: Place, expected: str) -> Exception:
    return finished_run(place, expected) or OutputError(
        f"{place.folder!r} does not have the run that this process was started for. Put the output on a file system "
        "that all machines share under the same name, or in an object store"
    )


def _begin(request: Request, job: ClassifyJob, place: Place, shards: int, compare: bool, progress: bool) -> None:
    """List the images, and write list and manifest, unless the run has begun; then ``compare`` them."""
    found = find(request.source)
    place.refuse_inputs([*found.locations, *request.input_files])
    with place.new_listing() as path:
        fingerprint = create_listing(path, found.entries(), found.kind, progress)
        images = opened(found, path, request.image_column, request.columns)
        written, settings = job.begin(images)
        new = Manifest(
            fastres=__version__,
            settings=settings,
            fingerprint=fingerprint,
            batch_size=job.batch_size,
            images=len(images),
            kind=found.kind,
            source=tuple(map(path_text, found.description)),
            image_column=request.image_column,
            columns=tuple(request.columns),
            skipped=sum(found.skipped.values()),
            listed=datetime.now(timezone.utc).isoformat(" ", "seconds"),
            shards=shards,
            schema=encoded_schema(written),
            arguments=request.arguments,
        )
        before = Manifest.of(place.manifest(), place.folder)
        if before is not None:
            if compare:
                _refuse_other_images(before, new, place, path)
            return
        place.publish(path, new.listing)
    place.write_first(MANIFEST, new.content())


def _refuse_other_images(before: Manifest, now: Manifest, place: Place, path: Any) -> None:
    """Raise ``ResumeError`` if the images have changed since the run began."""
    refuse_changes(before, {"source": list(now.source), **now.settings, "batch_size": now.batch_size}, place.folder)
    if before.fingerprint != now.fingerprint:
        raise ResumeError(
            f"{place.folder!r} belongs to a run over other images (use another output, or delete the folder to start "
            f"over): {difference(place.listing(before.listing), path)}"
        )


def refuse_finished(request: Request, place: Place) -> None:
    """Raise ``RunFinishedError`` if the output is the one that ``request`` asks for, ``OutputError`` if it is not.

    An output without its manifest is accepted if all rows of this run are finished: it is being joined, or the join was
    killed.
    """
    _end_if_asked_for(request, place)
    if place.output_size() is None or _is_all_but_joined(request, place):
        return
    _end_if_asked_for(request, place)  # its manifest may have been written in between
    raise OutputError(
        f"{place.output!r} already exists; use another output, or --overwrite to replace it when the table is written"
    )


def _end_if_asked_for(request: Request, place: Place) -> None:
    finished = place.finished()
    if finished and finished.get("arguments") == request.arguments and finished["fastres"] == __version__:
        raise RunFinishedError(finished)


def _is_all_but_joined(request: Request, place: Place) -> bool:
    manifest = Manifest.of(place.manifest(), place.folder)
    return bool(manifest and manifest.arguments == request.arguments and not missing_rows(place, manifest.images))


def classify_shard(request: Request, place: Place, shard: Shard, *, progress: bool) -> Report:
    """Compute the rows of a shard that nobody has finished. The output is written later, by ``join``.

    If the output is complete already, its report is returned, not that of the shard.
    Raises ``OutputError`` if the output exists, unless it is that of this run, or replaced.
    """
    began = time.monotonic()
    try:
        if not place.replaces:
            refuse_finished(request, place)
        with open_run(request, place, shards=shard.count, progress=progress) as run:
            manifest = run.manifest
            rows = shard.rows(manifest.images, manifest.batch_size)
            with rows_bar(f"classify {shard}", len(rows), 0, 0, progress) as tell:
                done = run.compute(rows, tell, progress)
            with unless_finished(place, manifest.run):
                left = sum(map(len, missing_rows(place, manifest.images)))
        seconds = time.monotonic() - began
        return Report(
            place.path,
            done.rows,
            done.errors,
            done.resumed,
            seconds,
            done.recomputed,
            manifest.skipped,
            str(shard),
            left,
        )
    except RunFinishedError as end:
        if progress:
            say(f"fastres: {place.output} is complete since {end.manifest['finished']}; there is nothing to do")
        return report_of(place, end.manifest, time.monotonic() - began)


def report_of(place: Place, finished: dict[str, Any], seconds: float) -> Report:
    """Return the report of the complete output with this manifest."""
    rows, errors, skipped = (int(finished[name]) for name in ("images", "errors", "skipped"))
    return Report(place.path, rows, errors, rows, seconds, skipped=skipped)
