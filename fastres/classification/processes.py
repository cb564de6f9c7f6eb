"""Several processes of this machine that compute shards: one for each GPU, or for a share of the processor.

They are started as new programs, so that neither threads nor the main module of this one matter to them. Each has a
socket to this process. If this process dies, they see the socket's end, write the rows that they have, and end too.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from fastres.errors import FastresError, InputError, WorkerError
from fastres.executors.quota import suitable_threads
from fastres.memory import keep_memory_of_program
from fastres.model.model import Model

from .batches import default_workers
from .driving import Begun, Failures, described_exit, sendable
from .places import Place
from .requests import Request
from .shards import decreasing
from .shared import RunFinishedError, Tell, open_run

# Ctrl-C reaches all processes, but the one that was started by the user stops the others.
_BOOT = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from multiprocessing.connection import Connection; connection = Connection(int(sys.argv[1])); "
    "sys.path[:] = connection.recv(); from fastres.classification.processes import serve; serve(connection)"
)
_BEGIN = "begin"  # sent in the place of a run
_GRACE = 20.0  # seconds in which a process may write its rows after it was told to stop


def devices(device: torch.device | str | None, processes: int | None) -> list[str]:
    """Return the device of each process. Without ``processes``, that is one for each GPU, or one for the processor.

    A number after ``cuda:`` means this GPU alone.
    """
    device = str(device) if device else ("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count() if device == "cuda" else 1
    known = [f"cuda:{number}" for number in range(count)] if device == "cuda" and count > 1 else [device]
    return [known[number % len(known)] for number in range(processes or len(known))]


class Processes:
    """A crew of processes on this machine; a context. ``devices`` has the device of each."""

    def __init__(self, request: Request, place: Place, devices: Sequence[str]) -> None:
        if isinstance(request.model, Model):
            raise InputError("several processes were asked for, but a loaded model was given; pass the model's name")
        self._size = len(devices)
        share = max(1, default_workers() // self._size)
        request = request if request.workers is not None else replace(request, workers=share)
        self._place = place
        self._requests = [replace(request, device=device) for device in devices]
        self._children: list[_Child] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.stop()
        deadline = time.monotonic() + _GRACE
        for child in self._children:
            child.end(deadline)

    def begin(self) -> Begun:
        for index in range(self._size):  # while the first lists the images, the others import and load
            self._started(index)
        first = self._children[0]
        first.open(None)
        while True:
            kind, value = first.receive()
            if kind == "begun":
                return value
            if kind == "failed":
                raise value

    def compute(self, begun: Begun, missing: Sequence[range], tell: Tell) -> None:
        failures = Failures(self._place)
        waiting = deque((0.0, shard) for shard in decreasing(missing, begun.batch_size, self._size))
        while waiting or any(child.shard for child in self._children):
            self._give_out(waiting, begun.run)
            for child in self._ready(waiting):
                self._hear(child, waiting, failures, tell)
        failures.check()

    def _started(self, index: int) -> _Child:
        share = max(1, suitable_threads() // self._size)
        child = _Child(self._requests[index], self._place, share)
        self._children[index : index + 1] = [child]
        return child

    def _give_out(self, waiting: deque[tuple[float, range]], run: str) -> None:
        """Give each idle process the next shard that may be tried now."""
        now = time.monotonic()
        for index, child in enumerate(self._children):
            due = next((entry for entry in waiting if entry[0] <= now), None)
            if child.shard is None and due is not None:
                waiting.remove(due)
                if child.has_ended:
                    child = self._started(index)
                if not child.is_open:
                    child.open(run)
                child.take(due[1])

    def _ready(self, waiting: deque[tuple[float, range]]) -> list[_Child]:
        """Wait until a process has something to say, or a shard may be tried again; return those processes."""
        busy = {child.connection: child for child in self._children if child.shard is not None}
        idle = len(busy) < len(self._children)
        patience = max(min(due for due, _ in waiting) - time.monotonic(), 0.01) if waiting and idle else None
        if not busy:
            time.sleep(patience or 0)
        return [busy[connection] for connection in wait(busy, patience)] if busy else []  # type: ignore[index]

    def _hear(self, child: _Child, waiting: deque[tuple[float, range]], failures: Failures, tell: Tell) -> None:
        shard = child.shard
        assert shard is not None
        kind, value = child.receive()
        if kind == "told":
            child.told = child.told[0] + value[0], child.told[1] + value[1]
            tell(*value)
        elif kind == "done":
            child.shard = None
        elif kind == "failed":
            child.shard = None
            tell(-child.told[0], -child.told[1])
            delay = failures.again(shard, value, f"in a process on {child.device}")
            if delay is not None:
                waiting.append((time.monotonic() + delay, shard))


class _Child:
    """A process that computes one shard after another. ``told`` are the rows and errors of the current one."""

    def __init__(self, request: Request, place: Place, threads: int) -> None:
        ours, theirs = socket.socketpair()
        with closing(theirs):
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self.connection = Connection(ours.detach())
        self.device = str(request.device)
        self.shard: range | None = None
        self.told = 0, 0
        self.is_open = False
        self._send(sys.path)
        self._send((request, place, threads))

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def open(self, run: str | None) -> None:
        """Have the process open the run with this ``Manifest.run``, or begin it."""
        self.is_open = True
        self._send(run or _BEGIN)

    def take(self, shard: range) -> None:
        self.shard, self.told = shard, (0, 0)
        self._send(shard)

    def receive(self) -> tuple[str, Any]:
        """Return the next message; if the process has died, a failure. Raises ``RunFinishedError``."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            return "failed", WorkerError(
                f"The process was {described_exit(self._process.poll())}. If it ran out of memory, use smaller batches "
                "or fewer workers"
            )
        if kind == "finished":
            raise RunFinishedError(value)
        return kind, value

    def stop(self) -> None:
        self._send(None)

    def end(self, deadline: float) -> None:
        """Wait for the end of the process; after ``deadline``, end it."""
        for number in (0, signal.SIGTERM, signal.SIGKILL):
            if number:
                self._process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(max(deadline - time.monotonic(), 0) if not number else 5)
                break
        self.connection.close()

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # it has died, which receiving from it will show
            self.connection.send(message)


# -- in the other process ------------------------------------------------------------------------------------


class _StoppedError(BaseException):
    """The process that gives out the shards wants this one to end, or is gone."""


def serve(connection: Connection) -> None:
    """Compute the shards that come through ``connection``, until it ends."""
    keep_memory_of_program()
    with suppress(_StoppedError, BrokenPipeError, ConnectionResetError):
        try:
            _serve(connection, *_received(connection))
        except RunFinishedError as end:
            connection.send(("finished", end.manifest))
        except Exception as error:
            connection.send(("failed", sendable(error)))
    os._exit(0)  # without waiting for threads of libraries


def _serve(connection: Connection, request: Request, place: Place, threads: int) -> None:
    if torch.device(request.device or "cpu").type == "cpu":
        torch.set_num_threads(min(threads, torch.get_num_threads()))
    tell = _teller(connection)
    model = request.opened_model()
    run = _received(connection)
    begins = run == _BEGIN
    options: dict[str, Any] = {"list_again": True} if begins else {"expected": run}
    with open_run(request, place, model=model, **options) as opened:
        if begins:
            connection.send(("begun", Begun.of(opened)))
        while True:
            shard = _received(connection)
            try:
                connection.send(("done", opened.compute(shard, tell)))
            except FastresError as error:
                connection.send(("failed", sendable(error)))


def _received(connection: Connection) -> Any:
    try:
        message = connection.recv()
    except (EOFError, OSError) as error:
        raise _StoppedError from error
    if message is None:
        raise _StoppedError
    return message


def _teller(connection: Connection) -> Callable[[int, int], None]:
    """Return a function that sends its arguments, and raises ``_StoppedError`` if this process is to stop."""

    def tell(rows: int, errors: int) -> None:
        if connection.poll():
            _received(connection)
        try:
            connection.send(("told", (rows, errors)))
        except OSError as error:
            raise _StoppedError from error

    return tell
