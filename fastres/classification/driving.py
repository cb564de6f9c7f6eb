"""A run whose shards one process gives out to others: it opens the run, watches over them, and joins the table."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from fastres.errors import FastresError, OutputError, ShardError, SourceError, WorkerError
from fastres.terminal import progress_bar
from fastres.text import path_text

from .joining import join
from .places import Place
from .report import Report
from .requests import Request
from .run import rows_bar
from .shards import described
from .shared import RunFinishedError, SharedRun, Tell, finished_run, missing_rows, open_run, refuse_finished

TRIES = 3  # of a shard, before the run fails
FAILED_SHARDS = 3  # after which no more are tried: the cause is not in the shards
_ROUNDS = 3  # over rows that are still missing, because somebody has deleted them
# What may pass: a file system or a network that fails for a moment, a process that is killed.
PASSING = (OSError, SourceError, OutputError, WorkerError)


@dataclass(frozen=True)
class Begun:
    """An open run: ``done`` of its rows are finished, ``errors`` of them with an error; ``missing`` are the others."""

    run: str
    images: int
    batch_size: int
    done: int
    errors: int
    recomputed: int
    missing: tuple[range, ...]

    @classmethod
    def of(cls, run: SharedRun) -> Begun:
        """Return the facts of ``run``, after a check of all its parts."""
        manifest = run.manifest
        kept = run.kept(range(manifest.images))
        recomputed = run.warn_of_damage(kept, range(manifest.images))
        facts = manifest.run, manifest.images, manifest.batch_size, kept.rows, kept.errors, recomputed
        return cls(*facts, tuple(kept.missing))


class Crew(Protocol):
    """Processes that compute shards."""

    def begin(self) -> Begun:
        """Open the run in one of the processes. Raises ``RunFinishedError``, and the errors of ``fastres.classify``."""

    def compute(self, begun: Begun, missing: Sequence[range], tell: Tell) -> None:
        """Compute the rows in ``missing``. ``tell`` gets what was added; negative numbers when rows are computed again.

        Raises ``ShardError`` when all that can be computed is, if some shards cannot. Raises ``RunFinishedError``.
        """


def drive(crew: Crew, request: Request, place: Place, *, resume: bool, progress: bool) -> Report:
    """Do the run of ``request`` with ``crew``, and write its output."""
    began = time.monotonic()
    _refuse_output(request, place, resume)
    try:
        if place.replaces and not resume:
            place.discard()
        with _clock("Starting, and listing the images", progress):
            begun = crew.begin()
        if place.manifest() == {} and not place.finished():
            raise OutputError(
                f"{place.folder!r} cannot be seen from here, although another process has written it; put the output "
                "on a file system that all machines share under the same name, or in an object store"
            )
        missing: Sequence[range] = begun.missing
        with rows_bar("classify", begun.images, begun.done, begun.errors, progress) as tell, _kept(place, begun):
            for _ in range(_ROUNDS):
                if missing:
                    crew.compute(begun, missing, tell)
                missing = missing_rows(place, begun.images)
                if not missing or finished_run(place, begun.run):
                    break
        report = join(place, progress=progress)
        done, recomputed = begun.done, begun.recomputed
    except RunFinishedError:  # by another driver
        report = join(place, progress=progress)
        done, recomputed = report.rows, 0
    return replace(report, resumed=done, recomputed=recomputed, seconds=time.monotonic() - began)


def _refuse_output(request: Request, place: Place, resume: bool) -> None:
    """Raise ``OutputError`` if the output exists: unless it may be replaced, or it is complete and to be resumed."""
    if place.replaces:
        return
    try:
        refuse_finished(request, place)
    except RunFinishedError:
        if not resume and not place.manifest():
            raise OutputError(
                f"{place.output!r} already exists; use another output, or --overwrite to replace it"
            ) from None


@contextmanager
def _clock(text: str, progress: bool) -> Iterator[None]:
    """Show ``text`` and the time since the block began, which another process may take minutes for."""
    with progress_bar(desc=text, bar_format="{desc}: {elapsed}", delay=1.0, leave=False, disable=not progress) as bar:

        def tick() -> None:
            bar.update(0)
            bar.refresh()

        with every(1.0, tick):
            yield


@contextmanager
def every(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Within the context, call ``call`` every so many ``seconds``, in a thread."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _kept(place: Place, begun: Begun) -> Iterator[None]:
    """If the block is interrupted, say in the exception how many rows are kept."""
    try:
        yield
    except KeyboardInterrupt as error:
        done = begun.images - sum(map(len, missing_rows(place, begun.images)))
        kept = f"{done:,} of {begun.images:,} rows are kept in {place.folder!r}; {place.again} to go on"
        error.args = (f"interrupted: {kept}",)
        raise


class ThisProcess:
    """A crew of this process alone, for outputs in object stores; a context."""

    def __init__(self, request: Request, place: Place) -> None:
        self._request, self._place = request, place
        self._stack = ExitStack()

    def __enter__(self) -> ThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self) -> Begun:
        opened = open_run(self._request, self._place, list_again=True)
        self._run = self._stack.enter_context(opened)
        return Begun.of(self._run)

    def compute(self, begun: Begun, missing: Sequence[range], tell: Tell) -> None:
        for rows in missing:
            self._run.compute(rows, tell)


class Failures:
    """The failures of shards, which decide when to try again and when to give up."""

    def __init__(self, place: Place) -> None:
        self._folder, self._again = place.folder, place.again
        self._tries: dict[range, int] = {}
        self._failed: dict[range, tuple[Exception, str]] = {}

    def again(self, shard: range, error: Exception, where: str) -> float | None:
        """Note a failure. Return after how many seconds to try again; ``None`` if there is no use in it.

        Raises ``error`` itself if it does not depend on the shard or on luck.
        """
        if isinstance(error, PASSING):
            self._tries[shard] = self._tries.get(shard, 0) + 1
            if self._tries[shard] < TRIES:
                return pause(self._tries[shard])
        self.fail(shard, error, where)
        return None

    def fail(self, shard: range, error: Exception, where: str) -> None:
        """Note that a shard cannot be computed. Raises ``error`` itself if it does not depend on the shard or on luck.

        Raises ``ShardError`` if so many have failed that there is no use in going on.
        """
        if not isinstance(error, PASSING):
            raise error
        self._failed[shard] = error, where
        if len(self._failed) >= FAILED_SHARDS:
            self.check()

    def check(self) -> None:
        """Raise ``ShardError`` if a shard has failed for good."""
        if not self._failed:
            return
        shard, (error, where) = next(iter(self._failed.items()))
        ranges = sorted(self._failed, key=lambda rows: rows.start)
        rows = sum(map(len, ranges))
        raise ShardError(
            f"{rows:,} rows could not be computed in {TRIES} tries ({described(ranges)}). Rows {shard.start:,} to "
            f"{shard.stop:,}, {where}: {error}. All other finished rows are kept in {path_text(self._folder)!r}; mend "
            f"the cause, and {self._again}"
        ) from error


def pause(tries: int) -> float:
    """Return how many seconds to wait after so many failed ``tries`` of a shard."""
    return float(2 ** (tries - 1))


def sendable(error: Exception) -> FastresError:
    """Return ``error`` as one of fastres's public errors, which another process can raise."""
    named = error if isinstance(error, FastresError) else WorkerError(f"{type(error).__name__}: {error}")
    public = next(kind for kind in type(named).__mro__ if kind.__module__ == FastresError.__module__)
    return public(str(named))


def described_exit(status: int | None) -> str:
    """Return how a process ended: ``"killed by signal 9"``."""
    if status is None:
        return "lost"
    return f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
