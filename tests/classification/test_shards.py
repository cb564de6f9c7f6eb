"""Shards: ranges of rows that several processes share out."""

from __future__ import annotations

import random
from typing import Any

import pytest

from fastres.classification.shards import Shard, decreasing
from fastres.errors import InputError


class TestShards:
    @pytest.mark.parametrize("images", [0, 1, 4, 5, 6, 24, 1001])
    @pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
    def test_they_have_every_row_once_and_whole_batches(self, images: int, count: int) -> None:
        shards = [Shard(number, count).rows(images, 5) for number in range(1, count + 1)]
        assert [row for rows in shards for row in rows] == list(range(images))
        assert all(rows.start % 5 == 0 for rows in shards if rows)
        sizes = [-(-len(rows) // 5) for rows in shards]
        assert max(sizes) - min(sizes) <= 1

    def test_decreasing_shards_have_every_row_once_and_whole_batches(self) -> None:
        generator = random.Random(0)
        for _ in range(100):
            batch, workers = generator.randrange(1, 20), generator.randrange(1, 9)
            edges = sorted(generator.randrange(400) * batch for _ in range(2 * generator.randrange(1, 4)))
            todo = [range(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]
            if todo and generator.random() < 0.5:
                todo[-1] = range(todo[-1].start, todo[-1].stop - generator.randrange(batch))
            shards = decreasing(todo, batch, workers)
            assert [row for rows in shards for row in rows] == [row for rows in todo for row in rows]
            assert all(rows and rows.start % batch == 0 for rows in shards)

    @pytest.mark.parametrize("given", ["0/4", "5/4", "3", "3/", "a/b", "-1/4", "", (1, 2, 3), (0, 2), 3, (1.5, 2)])
    def test_bad_names(self, given: Any) -> None:
        with pytest.raises(InputError, match="use I/N with I from 1 to N"):
            Shard.of(given)

    def test_names(self) -> None:
        assert Shard.of("3/16") == Shard.of((3, 16)) == Shard.of(" 3 / 16 ") == Shard(3, 16)
