"""The processes that decode images for a server, and the queue before them.

A process that dies is replaced, and its images go to another one. An image in whose decoding two processes died is
refused. A process that takes too long is ended.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from .arena import Arena
from .decoding import OK, REPLY, REQUEST, Decoding, run
from .failures import Refusal, image_kills

_AHEAD = 2  # images in a process: the one that it decodes and the next
_DEATHS = 2  # after as many deaths an image is refused
_SHORT_LIFE = 0.5  # seconds; a process that lived no longer is replaced after a pause


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
            process, began = None, loop.time()
            try:
                process = await _Process.started(self._arena, self._decoding, self._patience)
                await process.reply()  # says that it has imported everything
                self._processes.append(process)
                self._give_out()
                await self._listen(process)
            except (OSError, EOFError):  # also asyncio.IncompleteReadError: the process has ended
                pass
            finally:
                if process is not None:
                    self._processes = [other for other in self._processes if other is not process]
                    process.end()
                    self._take_back(process)
            self.deaths += process is not None
            self._give_out()
            if loop.time() - began < _SHORT_LIFE:
                await asyncio.sleep(_SHORT_LIFE)

    async def _listen(self, process: _Process) -> None:
        """Give the replies of a process to their images. Raises ``EOFError`` or ``OSError`` when the process ends."""
        while True:
            status, decoded, text = await process.reply()
            job = process.jobs.popleft()
            process.watch()
            self._give_out()
            job.finished()
            if job.future.done():  # nobody waits for it
                continue
            if status == OK:
                job.future.set_result(decoded)
            else:
                kind, message = text.split("\n", 1)
                job.future.set_exception(Refusal(status, kind, message))

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
    """One process and the images that were sent to it, oldest first."""

    def __init__(
        self,
        process: multiprocessing.process.BaseProcess,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        patience: float,
    ) -> None:
        self._process, self._reader, self._writer, self._patience = process, reader, writer, patience
        self._limit: asyncio.TimerHandle | None = None
        self.jobs: deque[_Job] = deque()

    @classmethod
    async def started(cls, arena: Arena, decoding: Decoding, patience: float) -> _Process:
        """Start a process."""
        ours, theirs = socket.socketpair()
        context = multiprocessing.get_context("forkserver")
        with theirs:
            process = context.Process(target=run, args=(theirs, arena, decoding), name="fastres-decoder", daemon=True)
            await asyncio.get_running_loop().run_in_executor(None, process.start)
        ours.setblocking(False)
        return cls(process, *await asyncio.open_unix_connection(sock=ours), patience)

    def send(self, job: _Job) -> None:
        self.jobs.append(job)
        self._writer.write(REQUEST.pack(job.slot, len(job.data)))
        self._writer.write(job.data)
        if len(self.jobs) == 1:
            self.watch()

    def watch(self) -> None:
        """End the process if it has not replied when its patience is over; called when it begins with an image."""
        if self._limit is not None:
            self._limit.cancel()
        loop = asyncio.get_running_loop()
        self._limit = loop.call_later(self._patience, self._process.kill) if self.jobs else None

    async def reply(self) -> tuple[int, Decoded, str]:
        """Return status, result and text of the oldest image. Raises ``EOFError`` or ``OSError``."""
        status, seconds, width, height, length = REPLY.unpack(await self._reader.readexactly(REPLY.size))
        text = (await self._reader.readexactly(length)).decode() if length else ""
        return status, Decoded(width, height, seconds), text

    def end(self) -> None:
        """End the process at once."""
        if self._limit is not None:
            self._limit.cancel()
        self._writer.close()
        self._process.kill()
