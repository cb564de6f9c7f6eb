"""The policy of the batches, with a model that answers when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from fastres.serving.batching import Batcher, Computed, Ready, batch_sizes, prepared_size
from fastres.serving.failures import ProcessDiedError, Refusal


class Model:
    """Computes batches one after another when :meth:`finish` is called. Batches with an image of ``kills`` fail."""

    def __init__(self, kills: Sequence[int] = ()) -> None:
        self.batches: list[tuple[int, ...]] = []
        self._kills = set(kills)
        self._waiting: list[asyncio.Event] = []

    async def __call__(self, batch: Sequence[Ready]) -> tuple[list[str], float]:
        slots = tuple(image.slot for image in batch)
        self.batches.append(slots)
        event = asyncio.Event()
        self._waiting.append(event)
        await event.wait()
        if self._kills & set(slots):
            raise ProcessDiedError
        return [f"maps of {slot}" for slot in slots], 0.25

    async def finish(self) -> None:
        """Finish the oldest batch."""
        await settled()
        self._waiting.pop(0).set()
        await settled()

    async def finish_all(self) -> None:
        await settled()
        while self._waiting:
            await self.finish()


class Images:
    """Starts images by number, and keeps what became of them."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self.free: list[int] = []
        self.tasks: dict[int, asyncio.Task[Computed]] = {}

    def start(self, *slots: int) -> None:
        for slot in slots:
            finished = partial(self.free.append, slot)
            self.tasks[slot] = asyncio.create_task(self._batcher.compute(Ready(slot, 0, finished)))


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20))


def test_sizes_are_all_small_ones_and_then_powers_of_two() -> None:
    assert batch_sizes(3) == [1, 2, 3]
    assert batch_sizes(100) == [*range(1, 17), 32, 64, 100]
    assert prepared_size(17, batch_sizes(100)) == 32
    assert prepared_size(65, batch_sizes(100)) == 100


def test_a_lone_image_does_not_wait_and_those_that_come_meanwhile_form_the_next_batch() -> None:
    async def test() -> None:
        model = Model()
        images = Images(Batcher(model, batch_sizes(4)))
        images.start(0)
        await settled()
        assert model.batches == [(0,)]
        images.start(1, 2, 3)
        await settled()
        assert model.batches == [(0,)]
        await model.finish()
        assert model.batches == [(0,), (1, 2, 3)]
        await model.finish_all()
        result = await images.tasks[2]
        assert (result.extra, result.batch, result.seconds) == ("maps of 2", 3, 0.25)
        assert sorted(images.free) == [0, 1, 2, 3]

    run(test())


def test_a_full_batch_is_sent_before_the_model_is_idle_but_only_one() -> None:
    async def test() -> None:
        model = Model()
        images = Images(Batcher(model, batch_sizes(2)))
        images.start(0)
        await settled()
        images.start(*range(1, 7))
        await settled()
        assert model.batches == [(0,), (1, 2)]
        await model.finish_all()
        assert model.batches == [(0,), (1, 2), (3, 4), (5, 6)]

    run(test())


def test_two_models_work_at_a_time() -> None:
    async def test() -> None:
        model = Model()
        images = Images(Batcher(model, batch_sizes(8), models=2))
        images.start(0)
        await settled()
        images.start(1)
        await settled()
        images.start(2)
        await settled()
        assert model.batches == [(0,), (1,)]
        await model.finish_all()
        assert model.batches == [(0,), (1,), (2,)]

    run(test())


@pytest.mark.parametrize(("pads", "size"), [(True, 20), (False, 16)])
def test_a_batch_is_filled_or_cut_to_a_prepared_size(pads: bool, size: int) -> None:
    async def test() -> None:
        model = Model()
        images = Images(Batcher(model, batch_sizes(32), pads=pads))
        images.start(0)
        await settled()
        images.start(*range(1, 21))
        await model.finish()
        assert model.batches == [(0,), tuple(range(1, size + 1))]
        await model.finish_all()
        assert sum(map(len, model.batches)) == 21

    run(test())


def test_a_batch_waits_for_images_on_their_way_but_never_without_them() -> None:
    async def test() -> None:
        model, coming = Model(), [1]
        images = Images(Batcher(model, batch_sizes(4), max_wait=0.05, upcoming=lambda: coming[0]))
        images.start(0)
        await settled()
        assert model.batches == []
        coming[0] = 0
        images.start(1)
        await settled()
        assert model.batches == [(0, 1)]
        await model.finish_all()
        coming[0] = 1
        images.start(2)
        await settled()
        assert model.batches == [(0, 1)]
        await asyncio.sleep(0.1)  # longer than max_wait
        assert model.batches == [(0, 1), (2,)]
        await model.finish_all()
        images.start(3, 4, 5, 6)
        await settled()
        assert model.batches[-1] == (3, 4, 5, 6)  # it is full
        await model.finish_all()

    run(test())


def test_a_client_that_leaves_frees_its_place_at_once_unless_the_model_reads_it() -> None:
    async def test() -> None:
        model = Model()
        images = Images(Batcher(model, batch_sizes(4)))
        images.start(0)
        await settled()
        images.start(1, 2)
        await settled()
        images.tasks[1].cancel()
        images.tasks[0].cancel()
        await settled()
        assert images.free == [1]
        await model.finish()
        assert images.free == [1, 0]
        assert model.batches == [(0,), (2,)]
        await model.finish_all()
        assert (await images.tasks[2]).batch == 1

    run(test())


def test_an_image_that_ends_the_model_fails_alone() -> None:
    async def test() -> None:
        model = Model(kills=[2])
        images = Images(Batcher(model, batch_sizes(4)))
        images.start(0)
        await settled()
        images.start(1, 2, 3)
        await model.finish_all()
        assert model.batches == [(0,), (1, 2, 3), (1,), (2,), (2,), (3,)]
        for slot in (0, 1, 3):
            assert (await images.tasks[slot]).extra == f"maps of {slot}"
        with pytest.raises(Refusal, match="twice") as caught:
            await images.tasks[2]
        assert caught.value.status == 422
        assert sorted(images.free) == [0, 1, 2, 3]

    run(test())


def test_a_suspect_whose_client_leaves_is_not_computed_again() -> None:
    async def test() -> None:
        model = Model(kills=[0, 1])
        images = Images(Batcher(model, batch_sizes(2)))
        images.start(9)
        await settled()
        images.start(0, 1)
        await model.finish()  # of 9
        await model.finish()  # of both, which fails
        images.tasks[1].cancel()
        await model.finish_all()
        assert model.batches == [(9,), (0, 1), (0,), (0,)]
        for slot in (0, 1):
            with suppress(Refusal, asyncio.CancelledError):
                await images.tasks[slot]
        assert sorted(images.free) == [0, 1, 9]

    run(test())
