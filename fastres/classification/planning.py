"""``fastres classify --dry-run``: what a run would do, and how long it would take. Nothing is written."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastres.terminal import progress_bar
from fastres.text import path_text, text_table

from . import parts
from .batches import PREFETCH
from .job import ClassifyJob
from .listing import create_listing
from .manifests import Manifest, refuse_changes
from .places import Place
from .requests import Request
from .shards import Shard
from .sources import Found, Images, find, opened

SECONDS, BATCHES = 3.0, 64  # the sample ends with whichever comes first
_SHOWN = 20  # shards in the text


@dataclass(frozen=True)
class PlannedShard:
    """The rows from ``start`` to ``stop``; ``finished`` of them are there already."""

    shard: str
    start: int
    stop: int
    finished: int


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    ``images_per_s`` was measured on this machine with ``sample`` images from all over the source; it is ``None`` if the
    source has too few images to tell. ``seconds`` is the time that the largest shard would take here, alone on the
    machine, without its start. ``listed`` says when the images were listed, if the run has begun. ``settings``
    determine the rows.
    """

    output: Path | str
    kind: str
    images: int
    skipped: int
    batch_size: int
    shards: tuple[PlannedShard, ...]
    images_per_s: float | None
    sample: int
    seconds: float | None
    listed: str | None
    settings: dict[str, Any]

    def __str__(self) -> str:
        begun = f"; listed at {self.listed}, when the run began" if self.listed else ""
        skipped = f", {self.skipped:,} skipped" if self.skipped else ""
        lines = [
            f"{path_text(self.output)}: {self.images:,} images ({self.kind}{skipped}{begun})",
            f"{self.settings['model']}, {self.settings['dtype']}, batches of {self.batch_size}",
        ]
        if self.images_per_s is None or self.seconds is None:
            lines.append("There are too few images to estimate the time")
        else:
            rate = f"{self.images_per_s:,.1f} images/s on this machine, from {self.sample:,} images"
            lines.append(f"about {_duration(self.seconds)} for {self._longest} ({rate})")
        rows = [("shard", "rows", "images", "finished")]
        for each in self.shards[:_SHOWN]:
            count = each.stop - each.start
            rows.append((each.shard, f"{each.start:,} to {each.stop:,}", f"{count:,}", f"{each.finished:,}"))
        lines.append(text_table(rows, right=(2, 3)))
        if len(self.shards) > _SHOWN:
            lines.append(f"… and {len(self.shards) - _SHOWN:,} more shards")
        lines.append("Dry run: nothing was written")
        return "\n".join(lines)

    @property
    def _longest(self) -> str:
        return "the run" if len(self.shards) == 1 else "the longest shard"


def plan(request: Request, place: Place, count: int, progress: bool) -> Plan:
    """Plan a run in ``count`` shards. Raises the errors of ``fastres.classify`` that show before the first row."""
    model = request.opened_model()
    manifest = Manifest.of(place.manifest(), place.folder)
    job = request.job(model, manifest.batch_size if manifest else None)
    with _listed(request, place, manifest, progress) as (found, images, skipped):
        _, settings = job.begin(images)
        if manifest:
            now = {"source": request.source_texts, **settings, "batch_size": job.batch_size}
            refuse_changes(manifest, now, place.folder)
        rate, sample = _speed(job, images, progress)
        named = parts.named_parts(place.names()) if manifest else []
        shards = []
        for number in range(1, count + 1):
            rows = Shard(number, count).rows(len(images), job.batch_size)
            missing = sum(map(len, parts.cover(named, rows)[1]))
            shards.append(PlannedShard(f"{number}/{count}", rows.start, rows.stop, len(rows) - missing))
        longest = max(each.stop - each.start - each.finished for each in shards)
        return Plan(
            output=place.path,
            kind=found.kind,
            images=len(images),
            skipped=skipped,
            batch_size=job.batch_size,
            shards=tuple(shards),
            images_per_s=rate,
            sample=sample,
            seconds=longest / rate if rate else None,
            listed=manifest.listed if manifest else None,
            settings=settings,
        )


@contextmanager
def _listed(
    request: Request, place: Place, manifest: Manifest | None, progress: bool
) -> Iterator[tuple[Found, Images, int]]:
    """Yield the images: those of the run, if it has begun, otherwise a new list in a temporary folder."""
    if manifest:
        found = Found(manifest.kind, (), manifest.source)
        listing = place.listing(manifest.listing)
        yield found, opened(found, listing, manifest.image_column, manifest.columns), manifest.skipped
        return
    found = find(request.source)
    place.refuse_inputs([*found.locations, *request.input_files])
    with tempfile.TemporaryDirectory(prefix="fastres-") as folder:
        path = Path(folder, "listing.jsonl")
        create_listing(path, found.entries(), found.kind, progress)
        images = opened(found, path, request.image_column, request.columns)
        yield found, images, sum(found.skipped.values())


def _speed(job: ClassifyJob, images: Images, progress: bool) -> tuple[float | None, int]:
    """Return images/s in a steady state, and the number of images measured, from batches all over the source."""
    size, total = job.batch_size, -(-len(images) // job.batch_size)
    numbers = sorted({index * total // BATCHES for index in range(BATCHES)})
    ranges = [range(number * size, min((number + 1) * size, len(images))) for number in numbers]
    ahead = min(PREFETCH * max(job.workers, 1), len(ranges) // 2)  # decoded while the first ones are awaited
    pieces = job.pieces(images, ranges)
    count, began, seconds = 0, 0.0, 0.0
    with suppress(StopIteration), progress_bar(desc="Measuring", unit="batch", delay=1.0, disable=not progress) as bar:
        for index in itertools.count():
            rows = job.rows(next(pieces)).rows.num_rows
            bar.update(1)
            if index == ahead:
                began = time.monotonic()
            elif index > ahead:
                count, seconds = count + rows, time.monotonic() - began
                if seconds > SECONDS:
                    break
    pieces.close()
    return (count / seconds if seconds else None), count


def _duration(seconds: float) -> str:
    """Return a time for people: ``"3 h 20 min"``, ``"4 min 10 s"``, ``"12 s"``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600:,} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
