"""Shards: ranges of rows, which several processes share out among themselves.

They begin and end between batches. So every process forms the batches that a single one would form, and gets the same
bytes.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastres.arguments import is_whole
from fastres.errors import InputError

_FORM = re.compile(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*")
_SHORTEST = 64  # the shortest shard is this part of what each worker computes in all


@dataclass(frozen=True)
class Shard:
    """Shard ``number`` of ``count``; the first is number 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def of(cls, given: object) -> Shard:
        """Return the shard for ``"3/16"`` or ``(3, 16)``. Raises ``InputError`` for anything else."""
        numbers: Sequence[object] = ()
        if isinstance(given, str) and (match := _FORM.fullmatch(given)):
            numbers = [int(match[1]), int(match[2])]
        elif isinstance(given, (tuple, list)):
            numbers = given
        if len(numbers) == 2 and all(map(is_whole, numbers)):
            number, count = (int(each) for each in numbers)  # type: ignore[call-overload]
            if 1 <= number <= count:
                return cls(number, count)
        raise InputError(f"shard is {given!r}; use I/N with I from 1 to N: '1/16' is the first of 16 shards")

    def rows(self, images: int, batch_size: int) -> range:
        """Return the rows of this shard of a run over ``images`` rows; there may be none."""
        batches = -(-images // batch_size)
        start, stop = (edge * batches // self.count * batch_size for edge in (self.number - 1, self.number))
        return range(min(start, images), min(stop, images))


def decreasing(todo: Sequence[range], batch_size: int, workers: int) -> list[range]:
    """Cut the rows in ``todo`` into shards for ``workers`` that take one after another: large ones first.

    Each round shares out half of what is left, down to shards of a 64th of a worker's rows. So each worker starts only
    about ten, and all end at nearly the same time.
    """
    ranges, shards = deque(todo), []
    left = sum(map(len, todo))
    least = left // (_SHORTEST * workers * batch_size)
    while ranges:
        size = max(-(-left // (2 * workers * batch_size)), least) * batch_size
        for _ in range(workers):
            if not ranges:
                break
            rows = ranges.popleft()
            cut = (rows.start + size) // batch_size * batch_size
            if cut < rows.stop:
                ranges.appendleft(range(cut, rows.stop))
                rows = range(rows.start, cut)
            shards.append(rows)
            left -= len(rows)
    return shards


def described(ranges: Sequence[range], most: int = 3) -> str:
    """Return ``"rows 0 to 96, 128 to 160 and 4 more ranges"``."""
    texts = [f"{rows.start:,} to {rows.stop:,}" for rows in ranges[:most]]
    more = f" and {len(ranges) - most:,} more ranges" if len(ranges) > most else ""
    return f"rows {', '.join(texts)}{more}"


def numbers_of(missing: Sequence[range], count: int, images: int, batch_size: int) -> Iterator[Shard]:
    """Yield the shards, of ``count``, that have some of the rows in ``missing``."""
    for number in range(1, count + 1):
        shard = Shard(number, count)
        rows = shard.rows(images, batch_size)
        if any(gap.start < rows.stop and rows.start < gap.stop for gap in missing):
            yield shard
