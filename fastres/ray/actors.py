"""What runs on the nodes of the cluster: the start of a run, its shards, and the count of the rows."""

from __future__ import annotations

import os
import pickle
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import ray

from fastres.classification.driving import PASSING, TRIES, Begun, pause, sendable
from fastres.classification.places import Place
from fastres.classification.requests import Request
from fastres.classification.shared import RunFinishedError, SharedRun, open_run
from fastres.errors import SourceError, WorkerError
from fastres.storage.urls import is_url

from .share import assigned, suitable_device, use_threads

_SMALLER = "smaller batches, fewer workers or fewer actors"
BEGUN, DONE, FAILED, FINISHED = "begun", "done", "failed", "finished"
Answer = tuple[str, bytes]  # one of these, and a pickled value


@dataclass(frozen=True)
class Task:
    """What an actor needs to know: the request, where its rows go, and the folder in which the driver was started."""

    request: Request
    place: Place
    folder: str

    def opened(self, run: str | None, stack: ExitStack) -> SharedRun:
        """Open the run on this node until ``stack`` is closed; begin it if ``run`` is ``None``."""
        share = assigned()
        request = replace(self.request, device=str(suitable_device(share, self.request.device)))
        threads = use_threads(share)
        if request.workers is None:
            request = replace(request, workers=threads)
        self._enter_folder()
        opened = open_run(request, self.place, expected=run, list_again=run is None)
        return stack.enter_context(opened)

    def _enter_folder(self) -> None:
        """Make relative paths mean what they mean to the driver."""
        try:
            os.chdir(self.folder)
        except OSError as error:
            relative = [name for name in self.request.sources if not is_url(name) and not os.path.isabs(name)]
            if relative:
                raise SourceError(
                    f"{relative[0]!r} is relative to {self.folder!r}, which {node_name()} does not have "
                    f"({error.strerror}); pass an absolute path on a file system that all nodes share, or a URL"
                ) from error


def node_name() -> str:
    """Return the name of this node for messages."""
    return f"node {socket.gethostname()}"


def begin(task: Task) -> Answer:
    """Open the run for the driver, which may be on a machine without the images. A task of Ray's."""
    try:
        with ExitStack() as stack:
            return _answer(BEGUN, Begun.of(task.opened(None, stack)))
    except RunFinishedError as end:
        return _answer(FINISHED, end.manifest)
    except Exception as error:
        return _answer(FAILED, (sendable(error), f"on {node_name()}"))


def _answer(kind: str, value: Any) -> Answer:
    return kind, pickle.dumps(value)


class Counter:
    """Counts rows and errors of the shards that actors work on. An actor of Ray's, on the driver's node."""

    def __init__(self) -> None:
        self._counts: dict[int, tuple[int, int]] = {}  # by the first row of the shard
        self._starts: dict[int, int] = {}

    def started(self, start: int) -> int:
        """Return how often an actor has started on a shard, this time included. Ray repeats it if an actor dies."""
        self._starts[start] = self._starts.get(start, 0) + 1
        return self._starts[start]

    def note(self, start: int, rows: int, errors: int) -> None:
        """Note that a shard has so many rows and errors by now; after an actor has died, it counts from 0 again."""
        self._counts[start] = rows, errors

    def totals(self) -> tuple[int, int]:
        """Return the numbers of rows and errors."""
        return sum(rows for rows, _ in self._counts.values()), sum(errors for _, errors in self._counts.values())


class ShardActor:
    """Computes shards: a callable class for ``map_batches``. Its batches have the rows ``start`` and ``stop``.

    It raises nothing, because Ray would stop the other actors. What goes wrong is in the columns ``kind`` and
    ``value``.
    """

    def __init__(self, task: Task, run: str, counter: Any) -> None:
        self._task, self._run_id, self._counter = task, run, counter
        self._stack = ExitStack()
        self._run: SharedRun | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        answers = [
            self._answered(range(int(start), int(stop)))
            for start, stop in zip(batch["start"], batch["stop"], strict=True)
        ]
        return {**batch, "kind": [kind for kind, _ in answers], "value": [value for _, value in answers]}

    def _answered(self, shard: range) -> Answer:
        """Compute a shard, and try again if what fails may pass."""
        if (starts := self._starts(shard)) > TRIES:
            reason = f"The actors that computed it died {starts - 1} times. If a node ran out of memory, use {_SMALLER}"
            return _answer(FAILED, (WorkerError(reason), f"last on {node_name()}"))
        for tried in range(1, TRIES):
            answer, passes = self._tried(shard)
            if not passes:
                return answer
            time.sleep(pause(tried))
        return self._tried(shard)[0]

    def _starts(self, shard: range) -> int:
        try:
            return int(ray.get(self._counter.started.remote(shard.start)))
        except ray.exceptions.RayError:  # the counter has died with its node; the rows do not need it
            return 1

    def _tried(self, shard: range) -> tuple[Answer, bool]:
        """Compute a shard; return the answer, and whether it is a failure that may pass."""
        try:
            return _answer(DONE, self._opened().compute(shard, self._teller(shard))), False
        except RunFinishedError as end:
            return _answer(FINISHED, end.manifest), False
        except Exception as error:
            return _answer(FAILED, (sendable(error), f"on {node_name()}")), isinstance(error, PASSING)

    def _opened(self) -> SharedRun:
        if self._run is None:
            self._run = self._task.opened(self._run_id, self._stack)
        return self._run

    def _teller(self, shard: range) -> Any:
        counted = [0, 0]

        def tell(rows: int, errors: int) -> None:
            counted[0], counted[1] = counted[0] + rows, counted[1] + errors
            self._counter.note.remote(shard.start, *counted)

        return tell
