"""The job of ``fastres evaluate``: the answers of every candidate to each image.

Candidates that need the same pixels share one reader. For each other preprocessing there is another one beside it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from fastres.classification.arrow_rows import identity_rows, identity_schema
from fastres.classification.batches import Reading
from fastres.classification.columns import Columns
from fastres.classification.job import sha256, transforms_setting
from fastres.classification.listing import Listing
from fastres.classification.parcels import Batch
from fastres.classification.run import Rows
from fastres.classification.sources import Images
from fastres.images.transforms import IMAGENET_MEAN, IMAGENET_STD, Transforms
from fastres.labels.finding import ImageLabels

from .candidates import Answers, Candidate
from .pictures import Pictures, whole_pictures
from .tables import Layout


@dataclass(frozen=True)
class Feed:
    """What a reader gives: the pixels after ``transforms``, on ``device``, or whole pictures if that is ``None``."""

    transforms: Transforms | None
    device: torch.device

    @classmethod
    def of(cls, candidate: Candidate) -> Feed:
        if candidate.whole_pictures:
            return cls(None, torch.device("cpu"))
        return cls(replace(candidate.transforms, mean=IMAGENET_MEAN, std=IMAGENET_STD), candidate.device)


@dataclass(frozen=True)
class Part:
    """The same images from every reader: batches of pixels, or whole pictures."""

    batches: Mapping[Feed, Batch | Pictures]

    @property
    def start(self) -> int:
        return next(iter(self.batches.values())).start

    @property
    def identity(self) -> Columns:
        return next(iter(self.batches.values())).identity

    @property
    def errors(self) -> tuple[str | None, ...]:
        """The error of each image: one that a reader rejects has no answer of any candidate."""
        every = [batch.errors for batch in self.batches.values()]
        return tuple(next((error for error in errors if error), None) for errors in zip(*every, strict=True))

    def pixels(self, candidate: Candidate) -> Any:
        """Return what ``candidate.run`` takes."""
        return self.batches[Feed.of(candidate)].pixels


@dataclass(frozen=True)
class Readers:
    """How images are read: ``batch_size``, number of ``workers`` (0: this process), and ``decoder`` name."""

    candidates: tuple[Candidate, ...]
    batch_size: int
    workers: int
    decoder: str

    @property
    def feeds(self) -> tuple[Feed, ...]:
        return tuple(dict.fromkeys(map(Feed.of, self.candidates)))

    def parts(self, images: Images, ranges: Sequence[range]) -> Generator[Part, None, None]:
        """Yield the images whose numbers are in ``ranges``, in order. Closing the generator stops its processes."""
        with ExitStack() as stack:
            readers = {feed: stack.enter_context(closing(self._reader(feed, images, ranges))) for feed in self.feeds}
            for batches in zip(*readers.values(), strict=True):
                yield Part(dict(zip(readers, batches, strict=True)))

    def _reader(self, feed: Feed, images: Images, ranges: Sequence[range]) -> Generator[Any, None, None]:
        if feed.transforms is None:
            return whole_pictures(images, ranges, self.batch_size)
        workers = -(-self.workers // len(self.feeds))
        return Reading(self.batch_size, workers, feed.transforms, self.decoder).batches(images, ranges, feed.device)

    def sample(self, images: Images, count: int) -> Part | None:
        """Return at most ``count`` readable images, at even distances; ``None`` if there are none."""
        total = len(images)
        rows = range(total) if total <= count else [place * total // count for place in range(count)]
        read = replace(self, batch_size=1, workers=0)
        with closing(read.parts(images, [range(row, row + 1) for row in rows])) as parts:
            good = [part for part in parts if part.errors == (None,)]
        return _joined(good) if good else None


def _joined(parts: Sequence[Part]) -> Part:
    """Return one part with all images. Its ``start`` and identities are those of the first."""
    joined: dict[Feed, Batch | Pictures] = {}
    for feed in parts[0].batches:
        batches = [part.batches[feed] for part in parts]
        first, errors = batches[0], (None,) * len(parts)
        if isinstance(first, Pictures):
            pixels: Any = [picture for batch in batches for picture in batch.pixels]
        else:
            pixels = torch.cat([batch.pixels for batch in batches])  # type: ignore[misc]
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        joined[feed] = replace(first, pixels=pixels, errors=errors)
    return Part(joined)


class EvaluateJob:
    """The answers of ``readers.candidates``, compared as ``references`` says (see :class:`fastres.evaluation.tables`).

    ``find_labels`` returns the labels of the images, or ``None`` without labels. The list of images is copied to
    ``scratch``, a folder, so that :attr:`images` can be read after the run. ``settings`` are further settings that
    determine the rows.
    """

    verb = "evaluate"

    def __init__(
        self,
        readers: Readers,
        find_labels: Callable[[Images], ImageLabels | None],
        references: Mapping[int, int],
        class_names: Callable[[ImageLabels | None], tuple[str, ...]],
        scratch: Path,
        settings: Mapping[str, Any],
    ) -> None:
        self._readers, self._find_labels, self._references = readers, find_labels, references
        self._class_names, self._scratch, self._given = class_names, scratch, settings

    images: Images
    labels: ImageLabels | None
    layout: Layout

    def begin(self, images: Images) -> tuple[pa.Schema, dict[str, Any]]:
        self.images, self.labels = self._kept(images), self._find_labels(images)
        names = self._class_names(self.labels)
        self.layout = Layout(
            identity_schema(images.identity), self._readers.candidates, names, self.labels is not None, self._references
        )
        self.layout.check()
        return self.layout.schema, self._settings(names)

    def _kept(self, images: Images) -> Images:
        """Return ``images`` with a list of their own, which stays when the work folder is deleted."""
        listing = getattr(images, "listing", None)
        if not isinstance(listing, Listing):  # the list of Parquet files is in memory
            return images
        copy = Path(shutil.copyfile(listing.path, self._scratch / "listing.jsonl"))
        return replace(images, listing=Listing(copy))  # type: ignore[type-var]

    def _settings(self, names: tuple[str, ...]) -> dict[str, Any]:
        candidates = self._readers.candidates
        return {
            **self._given,
            "models": {
                each.name: {**each.settings, "transforms": transforms_setting(each.transforms)} for each in candidates
            },
            "comparisons": {candidates[own].name: candidates[other].name for own, other in self._references.items()},
            "labels": None if self.labels is None else sha256(self.labels.indices.tobytes()),
            "class_names": sha256(json.dumps(names).encode()),
            "decoder": self._readers.decoder,
            "columns": self.layout.schema.names,
        }

    def pieces(self, images: Images, ranges: Sequence[range]) -> Generator[Part, None, None]:
        return self._readers.parts(images, ranges)

    def rows(self, piece: Part) -> Rows:
        errors = piece.errors
        answers: list[Answers] = [each.run(piece.pixels(each)) for each in self._readers.candidates]
        stop = piece.start + len(errors)
        labels = np.full(len(errors), -1) if self.labels is None else self.labels.indices[piece.start : stop]
        identity = identity_rows(piece.identity, self.layout.identity)
        rows = self.layout.rows(identity, errors, labels, answers)
        return Rows(piece.start, rows, sum(error is not None for error in errors))
