"""Shards: a checksum ties each to its run, its rows and its content, and they join without a seam."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest

from fastres.classification import shards
from fastres.errors import ResumeError

RUN = "a run"


def write(folder: Path, start: int, count: int) -> shards.Shard:
    rows = pa.record_batch(
        {"row": range(start, start + count), "error": ["broken" if i == 0 else None for i in range(count)]}
    )
    name, content = shards.packed([rows], RUN, start)
    (folder / name).write_bytes(content)
    return next(shard for shard in shards.named_shards(folder) if shard.path.name == name)


@pytest.mark.parametrize("sizes", [[5], [4, 4, 4], [1, 2, 3, 4, 5], [9, 1, 1], [3, 3, 2], [1, 13]], ids=str)
def test_merged_shards_have_every_row_once(sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP", 4)
    for index, size in enumerate(sizes):
        write(tmp_path, sum(sizes[:index]), size)
    tables = list(shards.merged(shards.named_shards(tmp_path), RUN))
    assert [row for table in tables for row in table["row"].to_pylist()] == list(range(sum(sizes)))
    assert [table.num_rows for table in tables] == [4] * (sum(sizes) // 4) + [sum(sizes) % 4] * (sum(sizes) % 4 > 0)


def test_a_run_takes_over_only_its_own_intact_shards(tmp_path: Path) -> None:
    first, second, third = (write(tmp_path, start, 4) for start in (0, 4, 8))
    kept = shards.check(tmp_path, RUN, 12, progress=False)
    assert (kept.good, kept.bad, kept.errors) == ([first, second, third], [], 3)
    assert shards.check(tmp_path, "another run", 12, progress=False).bad == [first, second, third]
    assert shards.check(tmp_path, RUN, 11, progress=False).bad == [third]
    content = second.path.read_bytes()
    generator = random.Random(0)
    for _ in range(100):
        position, cut = generator.randrange(len(content)), generator.random() < 0.3
        changed = bytearray(content)
        changed[position] ^= 1 << generator.randrange(8)
        second.path.write_bytes(content[:position] if cut else bytes(changed))
        kept = shards.check(tmp_path, RUN, 12, progress=False)
        assert (kept.good, kept.bad, kept.errors) == ([first, third], [second], 2)
        with pytest.raises(ResumeError, match="is damaged"):
            list(shards.merged([first, second], RUN))
    assert shards.gaps(kept.good, 15) == [range(4, 8), range(12, 15)]


def test_a_renamed_or_overlapping_shard_is_not_taken_over(tmp_path: Path) -> None:
    first, overlapping = write(tmp_path, 0, 4), write(tmp_path, 2, 4)
    moved = first.path.with_name(first.path.name.replace("-000000000000-000000000004", "-000000000006-000000000010"))
    moved.write_bytes(first.path.read_bytes())
    kept = shards.check(tmp_path, RUN, 20, progress=False)
    assert kept.good == [first]
    assert [shard.path for shard in kept.bad] == [overlapping.path, moved]


def test_gaps() -> None:
    assert shards.gaps([], 0) == []
    assert shards.gaps([], 3) == [range(3)]
