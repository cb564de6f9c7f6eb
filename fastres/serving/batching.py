"""The policy by which a server forms batches: an idle model takes all that is ready, so that nothing waits for others.

While the model runs, further images become ready, and the next batch is larger by itself. With ``max_wait`` above 0 a
batch that is not full waits up to this long, but only while further images are on their way. A request that is alone
therefore never waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .failures import ProcessDiedError, image_kills

EXACT = 16  # up to here, each number of images is a size of its own


def batch_sizes(largest: int) -> list[int]:
    """Return the sizes for which a model is prepared: all up to 16, then powers of two up to ``largest``, included."""
    powers = [2**n for n in range(5, 32) if 2**n < largest]
    return sorted({*range(1, min(largest, EXACT) + 1), *powers, largest})


def prepared_size(count: int, sizes: Sequence[int]) -> int:
    """Return the smallest of ``sizes`` that holds ``count`` images."""
    return next((size for size in sizes if size >= count), sizes[-1])


@dataclass(eq=False)
class Ready:
    """A decoded image in ``slot``. ``wants`` is what to compute beside scores and embedding; see :class:`Work`."""

    slot: int
    wants: Any
    finished: Callable[[], None]  # called once no model reads the slot
    since: float = 0.0
    failures: int = 0
    future: asyncio.Future[Computed] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(frozen=True)
class Computed:
    """The result of an image: ``extra`` is what it wanted beside; times are in seconds."""

    extra: Any
    batch: int
    waited: float
    seconds: float


# Computes a batch; returns what each image wanted beside and the model's seconds. Raises ProcessDiedError.
Compute = Callable[[Sequence[Ready]], Awaitable[tuple[Sequence[Any], float]]]


class Batcher:
    """Forms batches for ``models`` models. ``upcoming`` tells how many images will become ready soon.

    ``sizes`` are the numbers of images that the models are prepared for. If ``pads``, a model fills a batch up to the
    next of them, otherwise a batch is cut down to one.
    """

    def __init__(
        self,
        compute: Compute,
        sizes: Sequence[int],
        *,
        models: int = 1,
        pads: bool = False,
        max_wait: float = 0.0,
        upcoming: Callable[[], int] = lambda: 0,
        observe: Callable[[int, Sequence[float], float], None] = lambda count, waited, seconds: None,
    ) -> None:
        self._compute, self._sizes, self._models, self._pads = compute, sizes, models, pads
        self._max_wait, self._upcoming, self._observe = max_wait, upcoming, observe
        self._ready: deque[Ready] = deque()
        self._suspects: deque[Ready] = deque()  # images of batches that failed; each runs alone
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def compute(self, image: Ready) -> Computed:
        """Compute an image in some batch. Raises ``Refusal`` if it makes the model fail.

        If the caller is cancelled, a waiting image leaves the queue at once.
        """
        image.since = time.monotonic()
        self._ready.append(image)
        self.dispatch()
        try:
            return await image.future
        except asyncio.CancelledError:
            for queue in (self._ready, self._suspects):
                with suppress(ValueError):  # it is in a batch
                    queue.remove(image)
                    image.finished()
            raise

    def dispatch(self) -> None:
        """Start the batches that may start now."""
        while batch := self._next():
            task = asyncio.get_running_loop().create_task(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _next(self) -> list[Ready]:
        """Take the next batch from the queues; return nothing if none may start now."""
        busy, largest = len(self._running), self._sizes[-1]
        if busy >= self._models:
            # One full batch more for each model, so that it need not wait for the next one.
            full = busy < 2 * self._models and len(self._ready) >= largest and not self._suspects
            return self._taken(largest) if full else []
        if self._suspects:
            return [self._suspects.popleft()]
        count = min(len(self._ready), largest)
        if not count or (count < largest and self._waits()):
            return []
        if not self._pads:
            count = max(size for size in self._sizes if size <= count)
        return self._taken(count)

    def _taken(self, count: int) -> list[Ready]:
        return [self._ready.popleft() for _ in range(count)]

    def _waits(self) -> bool:
        """Return True if a batch that is not full should wait for further images; set the timer for its start."""
        if not self._max_wait or not self._upcoming():
            return False
        loop = asyncio.get_running_loop()
        left = self._ready[0].since + self._max_wait - time.monotonic()
        if left <= 0:
            return False
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(left, self.dispatch)
        return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self.dispatch()

    async def _run(self, batch: list[Ready]) -> None:
        now = time.monotonic()
        waited = [now - image.since for image in batch]
        try:
            extras, seconds = await self._compute(batch)
        except ProcessDiedError:
            for image in reversed(batch):
                self._failed(image, alone=len(batch) == 1)
            return
        self._observe(len(batch), waited, seconds)
        for image, extra, wait in zip(batch, extras, waited, strict=True):
            if not image.future.done():
                image.future.set_result(Computed(extra, len(batch), wait, seconds))
            image.finished()

    def _failed(self, image: Ready, alone: bool) -> None:
        """Have an image of a failed batch computed alone; refuse it if it makes the model fail twice."""
        image.failures += alone
        if image.future.done():
            image.finished()
        elif image.failures >= 2:
            image.finished()
            image.future.set_exception(image_kills())
        else:
            self._suspects.appendleft(image)
