"""The way of an image through a server: a place in the queue, a decoder, a batch, the result."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arena import Arena
from .batching import Batcher, Computed, Ready
from .decoders import Decoded, Decoders
from .failures import no_place
from .metrics import Metrics

_INTERVAL = 1.0  # seconds over which the rate is measured


@dataclass(frozen=True)
class Result:
    """The result of an image: ``scores`` float32 ``[classes]``, ``embedding`` float32 ``[features]``.

    ``computed.extra`` has the maps if they were wanted.
    """

    scores: np.ndarray[Any, Any]
    embedding: np.ndarray[Any, Any]
    decoded: Decoded
    computed: Computed

    @property
    def milliseconds(self) -> dict[str, float]:
        """How long the image was decoded, how long it waited for a model, and how long its batch was computed."""
        times = {"decode": self.decoded.seconds, "queue": self.computed.waited, "model": self.computed.seconds}
        return {name: round(1000 * seconds, 3) for name, seconds in times.items()}


class Places:
    """The slots of an arena that are free. A slot is taken by several users, and free when the last has finished."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))
        self._users = [0] * count

    @property
    def taken(self) -> int:
        return self.count - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Take ``count`` slots, or none if there are not as many."""
        if count > len(self._free):
            return None
        slots = [self._free.pop() for _ in range(count)]
        for slot in slots:
            self.use(slot)
        return slots

    def use(self, slot: int) -> None:
        """Note a further user of a slot that is taken."""
        self._users[slot] += 1

    def finished(self, slot: int) -> None:
        """Note that a user needs the slot no more."""
        self._users[slot] -= 1
        if not self._users[slot]:
            self._free.append(slot)


class Engine:
    """Answers images with at most ``arena.slots`` of them at a time."""

    def __init__(self, arena: Arena, decoders: Decoders, batcher: Batcher, metrics: Metrics) -> None:
        self.arena, self.decoders, self.batcher, self._metrics = arena, decoders, batcher, metrics
        self.places = Places(arena.slots)
        self._rate = 0.0  # images per second of late
        self._counted, self._since = 0, 0.0

    def admit(self, count: int) -> list[int]:
        """Take places for ``count`` images. Raises ``Refusal`` (429) if there are not enough."""
        slots = self.places.take(count)
        if slots is None:
            raise no_place(self.retry_after())
        return slots

    def refuse_if_full(self) -> None:
        """Raise ``Refusal`` (429) if there is no place, before the body of a request is read."""
        if self.places.taken >= self.places.count:
            raise no_place(self.retry_after())

    def retry_after(self) -> int:
        """Return the seconds after which half of the queue should be done, at least 1."""
        return min(max(1, math.ceil(self.places.taken / 2 / self._rate)), 60) if self._rate else 1

    async def answers(self, files: Sequence[bytes], maps: int = 0) -> list[Result | BaseException]:
        """Return the result of each image file, or its ``Refusal``. ``maps`` class-activation maps are computed.

        Raises ``Refusal`` (429) if there are not as many places. If the caller is cancelled, so are the images, and
        those that wait leave the queue at once.
        """
        tasks, slots = [], self.admit(len(files))
        if len(files) == 1:  # the usual case, without a task of its own
            try:
                return [await self._answer(slots[0], files[0], maps)]
            except Exception as error:
                return [error]
            finally:
                self.places.finished(slots[0])
        for slot, data in zip(slots, files, strict=True):
            task = asyncio.create_task(self._answer(slot, data, maps))
            task.add_done_callback(lambda _, slot=slot: self.places.finished(slot))  # type: ignore[misc]
            tasks.append(task)
        return await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, slot: int, data: bytes, maps: int) -> Result:
        def finished() -> None:
            self.places.finished(slot)

        self.places.use(slot)
        decoded = await self.decoders.decode(slot, data, finished)
        self._metrics.decode_seconds.observe(decoded.seconds)
        self.places.use(slot)
        computed = await self.batcher.compute(Ready(slot, maps, finished))
        self._count()
        return Result(self.arena.scores(slot).copy(), self.arena.embedding(slot).copy(), decoded, computed)

    def _count(self) -> None:
        """Count an answered image, for :meth:`retry_after`."""
        now = time.monotonic()
        self._metrics.images.inc()
        self._counted += 1
        if now - self._since >= _INTERVAL:
            if now - self._since < 10 * _INTERVAL:  # otherwise the server was idle meanwhile
                self._rate = self._counted / (now - self._since)
            self._counted, self._since = 0, now
