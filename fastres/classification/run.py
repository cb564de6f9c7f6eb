"""A run over all images of a source: list them, compute the rows that are missing, and write the output."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastres.errors import OutputError, WorkerError
from fastres.terminal import is_terminal, progress_bar
from fastres.text import path_text
from fastres.version import __version__

from . import parts
from .batches import worker_died
from .listing import write_listing
from .report import Report
from .sources import Found, Images, opened
from .work import open_work

Piece = TypeVar("Piece")


class Job(Protocol[Piece]):
    """What a run computes for each image: one row of the output. A ``Piece`` is a batch of images, ready to be used."""

    verb: str  # for the progress bar

    def begin(self, images: Images) -> tuple[Any, dict[str, Any]]:
        """Return the columns of the output, as ``formats.open_writer`` wants them, and the settings that determine its
        rows, as JSON values.

        Called once, before any row is computed. May raise the errors of arguments that do not fit ``images``.
        """

    def pieces(self, images: Images, ranges: Sequence[range]) -> Generator[Piece, None, None]:
        """Yield the images whose numbers are in ``ranges``, in order. Closing the generator stops its processes."""

    def rows(self, piece: Piece) -> Rows:
        """Return the rows of a batch."""


@dataclass(frozen=True)
class Rows:
    """The rows from number ``start`` on; ``errors`` of them have an error."""

    start: int
    rows: parts.Rows
    errors: int


def run(
    job: Job[Piece],
    found: Found,
    output: Path,
    *,
    image_column: str | None,
    columns: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    progress: bool,
    is_temporary: bool = False,
) -> Report:
    """Do ``job`` for every image in ``found``, and write the rows to ``output``. See :func:`fastres.classify`.

    If ``is_temporary``, the caller deletes the output and its work folder, so that no run can be resumed.
    """
    began = time.monotonic()
    with open_work(output, resume, overwrite) as work:
        work.is_temporary = is_temporary
        with work.writing(work.new_listing) as file:
            fingerprint = write_listing(found.entries(), found.kind, file, progress)
        images = opened(found, work.new_listing, image_column, columns)
        written, settings = job.begin(images)
        count = len(images)
        errors = work.begin(settings, fingerprint, count, progress)
        resumed, recomputed = work.done, work.recomputed
        if work.complete:
            work.discard()
        else:
            images = opened(found, work.listing, image_column, columns)  # the list has its final name now
            description = [path_text(name) for name in found.description]
            metadata = {
                "version": __version__, **settings, "source": description, "images": count, "listing": fingerprint
            }  # fmt: skip
            with rows_bar(job.verb, count, work.done, errors, progress) as tell:
                errors += compute(job, images, work, count, tell)
            with _kept_on_failure(work, count):
                work.finish(written, metadata, errors, progress)
    seconds, skipped = time.monotonic() - began, sum(found.skipped.values())
    return Report(output, count, errors, resumed, seconds, recomputed, skipped)


class Rowkeeper(Protocol):
    """Takes the rows that :func:`compute` makes. ``gaps`` are those to be computed, ``done`` how many are kept."""

    gaps: list[range]
    is_temporary: bool

    @property
    def done(self) -> int: ...

    @property
    def folder(self) -> str | Path: ...

    @property
    def advice(self) -> str: ...

    def add(self, start: int, rows: parts.Rows) -> None: ...

    def flush(self) -> None: ...


def compute(job: Job[Piece], images: Images, keeper: Rowkeeper, count: int, tell: Callable[[int, int], None]) -> int:
    """Compute the rows in ``keeper.gaps``; return how many of them have an error. ``count`` is for messages.

    ``tell`` is called with the numbers of rows and of errors of each batch.
    """
    failed = 0
    # The rows are written before the workers are stopped, which can take seconds: a second interrupt may follow.
    with closing(job.pieces(images, keeper.gaps)) as pieces, _kept_on_failure(keeper, count):
        for piece in pieces:
            part = job.rows(piece)
            keeper.add(part.start, part.rows)
            failed += part.errors
            tell(part.rows.num_rows, part.errors)
    return failed


@contextmanager
def rows_bar(verb: str, count: int, done: int, errors: int, progress: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar over ``count`` rows; yield a function to be called with further rows and errors."""
    with progress_bar(
        total=count, initial=done, desc=verb, unit="image", disable=not progress, smoothing=0.05,
        mininterval=0.2 if is_terminal(sys.stderr) else 30,
    ) as bar:  # fmt: skip
        bar.set_postfix(errors=errors)

        def tell(rows: int, failed: int) -> None:
            nonlocal errors
            errors += failed
            bar.set_postfix(errors=errors, refresh=False)
            bar.update(rows)

        yield tell


@contextmanager
def _kept_on_failure(work: Rowkeeper, count: int) -> Iterator[None]:
    """If the block raises, write the finished rows, and say in the error how many were kept."""
    try:
        yield
    except OutputError:
        raise
    except BaseException as error:
        work.flush()
        kept = f"{work.done:,} of {count:,} rows are kept in {str(work.folder)!r}; {work.advice}"
        if work.is_temporary:
            kept = "without an output, no row is kept; run it again"
        elif not work.done:
            kept = "no row was finished; run it again"
        if isinstance(error, KeyboardInterrupt):
            error.args = (f"interrupted: {kept}",)
        if worker_died(error):
            raise WorkerError(
                f"A process that reads images died ({error}). {kept}. If it ran out of memory, use fewer workers or "
                "smaller batches. If it dies on the same images again, try --decoder exact"
            ) from error
        raise
