"""The processes that decode images for a server, and the queue before them.

A process that dies is replaced, and its images go to another one. An image in whose decoding two processes died is
refused. A process that takes too long is ended.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from .arena import Arena
from .decoding import OK, SLOT, Decoding, run
from .failures import Refusal, image_kills
from .messages import Messenger, Patience

_AHEAD = 2  # images in a process: the one that it decodes and the next
_DEATHS = 2  # after as many deaths an image is refused
_SHORT_LIFE = 0.5  # seconds; a process that lived no longer is replaced after a pause
_log = logging.getLogger("fastres.serving")


@dataclass
class Decoded:
    """The upright size of an image, in pixels, and how long its decoding took."""

    width: int
    height: int
    seconds: float


@dataclass(eq=False)
class _Job:
    slot: int
    data: bytes
    future: asyncio.Future[Decoded]
    finished: Callable[[], None]  # called once no process writes into the slot
    deaths: int = 0


class Decoders:
    """``count`` processes. One that works on one image for longer than ``patience`` seconds is ended."""

    def __init__(self, count: int, arena: Arena, decoding: Decoding, patience: float) -> None:
        self._count, self._arena, self._decoding, self._patience = count, arena, decoding, patience
        self._waiting: deque[_Job] = deque()
        self._processes: list[_Process] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.deaths = 0

    @property
    def unfinished(self) -> int:
        """How many images are waiting or being decoded."""
        return len(self._waiting) + sum(len(process.jobs) for process in self._processes)

    @property
    def ready(self) -> bool:
        """True if at least one process can decode."""
        return bool(self._processes)

    async def start(self) -> None:
        """Start the processes. They import what they need while the first images may already wait."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fastres.serving.decoding"])
        for _ in range(self._count):
            self._tasks.add(asyncio.create_task(self._keep_one()))

    async def close(self) -> None:
        """End all processes."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def decode(self, slot: int, data: bytes, finished: Callable[[], None]) -> Decoded:
        """Decode the file ``data`` into ``slot``. ``finished`` is called when no process uses the slot any more.

        Raises ``Refusal``. If the caller is cancelled, a waiting image leaves the queue at once.
        """
        job = _Job(slot, data, asyncio.get_running_loop().create_future(), finished)
        self._waiting.append(job)
        self._give_out()
        try:
            return await job.future
        except asyncio.CancelledError:
            with suppress(ValueError):  # a process has it already
                self._waiting.remove(job)
                job.finished()
            raise

    def _give_out(self) -> None:
        """Send waiting images to the processes with the fewest."""
        while self._waiting:
            free = [process for process in self._processes if len(process.jobs) < _AHEAD]
            if not free:
                return
            job = self._waiting.popleft()
            min(free, key=lambda process: len(process.jobs)).send(job)

    async def _keep_one(self) -> None:
        """Keep one process running until the task is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            process = _Process(self._patience, self._ready_or_done)
            try:
                await process.start(self._arena, self._decoding)
                await process.ended
            except (OSError, EOFError) as error:  # no memory or no open files left; there may be some later
                _log.error("A decoder could not start: %r", error)
            finally:
                process.end()
                self._processes = [other for other in self._processes if other is not process]
                self._take_back(process)
            self.deaths += 1
            self._give_out()
            if loop.time() - began < _SHORT_LIFE:
                await asyncio.sleep(_SHORT_LIFE)

    def _ready_or_done(self, process: _Process) -> None:
        """Give further images to a process that has started, or is done with one."""
        if process not in self._processes:
            self._processes.append(process)
        self._give_out()

    def _take_back(self, process: _Process) -> None:
        """Put the images of a dead process back to the head of the queue; the first is the one that it decoded."""
        for number, job in reversed(list(enumerate(process.jobs))):
            job.deaths += number == 0
            if job.future.done():
                job.finished()
            elif job.deaths >= _DEATHS:
                job.finished()
                job.future.set_exception(image_kills())
            else:
                self._waiting.appendleft(job)


class _Process:
    """One process and the images that were sent to it, oldest first.

    ``ready_or_done`` is called when it may get another image.
    """

    def __init__(self, patience: float, ready_or_done: Callable[[_Process], None]) -> None:
        self._ready_or_done = ready_or_done
        self._process: multiprocessing.process.BaseProcess | None = None
        self._messenger = Messenger(self._arrived, self._lost)
        self._is_ready = False
        self._patience = Patience(patience, self._kill)
        self.jobs: deque[_Job] = deque()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self, arena: Arena, decoding: Decoding) -> None:
        """Start the process."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        context = multiprocessing.get_context("forkserver")
        with theirs:
            arguments = theirs, arena, decoding
            self._process = context.Process(target=run, args=arguments, name="fastres-decoder", daemon=True)
            await loop.run_in_executor(None, self._process.start)
        ours.setblocking(False)
        await loop.create_unix_connection(lambda: self._messenger, sock=ours)

    def send(self, job: _Job) -> None:
        self.jobs.append(job)
        self._messenger.send(SLOT.pack(job.slot), job.data)
        if len(self.jobs) == 1:
            self._patience.begin()

    def end(self) -> None:
        """End the process at once."""
        self._patience.end()
        self._messenger.close()
        self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _arrived(self, message: bytes) -> None:
        """Give a reply to its image. The first message only says that the process is ready."""
        job = self.jobs.popleft() if self._is_ready else None
        self._is_ready = True
        self._patience.end()
        if self.jobs:
            self._patience.begin()
        self._ready_or_done(self)
        if job is None:
            return
        job.finished()
        if job.future.done():  # nobody waits for it
            return
        status, seconds, width, height, kind, text = json.loads(message)
        if status == OK:
            job.future.set_result(Decoded(width, height, seconds))
        else:
            job.future.set_exception(Refusal(status, kind, text))

    def _lost(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
