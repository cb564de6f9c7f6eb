"""Parts: a checksum ties each to its run, its rows and its content, and they join without a seam."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest

from fastres.classification import parts
from fastres.classification.lines import Lines
from fastres.classification.parts import Part, Slice
from fastres.errors import ResumeError

RUN = "a run"


kinds = pytest.mark.parametrize("kind", ["arrow", "lines"])


def rows_from(start: int, count: int, kind: str) -> parts.Rows:
    """Return rows with their numbers; the first has an error."""
    if kind == "lines":
        return Lines([f"{row}\n" for row in range(start, start + count)], [0])
    return pa.record_batch(
        {"row": range(start, start + count), "error": ["broken" if i == 0 else None for i in range(count)]}
    )


def numbers(pieces: list[parts.Rows]) -> list[int]:
    found = [piece.texts if isinstance(piece, Lines) else piece["row"].to_pylist() for piece in pieces]
    return [int(row) for each in found for row in each]


def write(folder: Path, start: int, count: int, kind: str = "arrow") -> Part:
    name, content = parts.packed([rows_from(start, count, kind)], RUN, start)
    (folder / name).write_bytes(content)
    return next(part for part in parts_in(folder) if part.name == name)


def parts_in(folder: Path) -> list[Part]:
    return parts.named_parts(path.name for path in folder.iterdir())


def check(folder: Path, count: int, run: str = RUN, rows: range | None = None) -> parts.Kept:
    return parts.check(
        parts_in(folder), range(count) if rows is None else rows, count, run, read_in(folder), progress=False
    )


def read_in(folder: Path) -> parts.Read:
    return lambda name: (folder / name).read_bytes()


def merged(slices: list[Slice], folder: Path) -> list[parts.Rows]:
    return list(parts.merged(slices, RUN, read_in(folder)))


@pytest.mark.parametrize("sizes", [[5], [4, 4, 4], [1, 2, 3, 4, 5], [9, 1, 1], [3, 3, 2], [1, 13]], ids=str)
def test_merged_parts_have_every_row_once(sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "ROW_GROUP", 4)
    for index, size in enumerate(sizes):
        write(tmp_path, sum(sizes[:index]), size)
    slices, missing = parts.cover(parts_in(tmp_path), range(sum(sizes)))
    tables = merged(slices, tmp_path)
    assert not missing
    assert numbers(tables) == list(range(sum(sizes)))
    assert [table.num_rows for table in tables] == [4] * (sum(sizes) // 4) + [sum(sizes) % 4] * (sum(sizes) % 4 > 0)


@kinds
def test_parts_that_overlap_in_any_way_have_every_row_once(tmp_path: Path, kind: str) -> None:
    generator = random.Random(0)
    for number in range(200):
        folder = tmp_path / str(number)
        folder.mkdir()
        for _ in range(generator.randrange(8)):
            write(folder, generator.randrange(20), generator.randrange(1, 10), kind)
        first = generator.randrange(10)
        wanted = range(first, generator.randrange(first, 30))
        there = {row for part in parts_in(folder) for row in range(part.start, part.stop)}
        slices, missing = parts.cover(parts_in(folder), wanted)
        rows = numbers(merged(slices, folder))
        assert rows == sorted(there & set(wanted))
        assert [row for gap in missing for row in gap] == sorted(set(wanted) - there)
        kept = check(folder, 30, rows=wanted)
        failed = [place for piece in merged(slices, folder) for place in parts.failed(piece)]
        assert (kept.slices, kept.missing, kept.bad, kept.errors) == (slices, missing, [], len(failed))


@kinds
def test_a_run_takes_over_only_its_own_intact_parts(tmp_path: Path, kind: str) -> None:
    first, second, third = (write(tmp_path, start, 4, kind) for start in (0, 4, 8))
    kept = check(tmp_path, 12)
    assert ([each.part for each in kept.slices], kept.bad, kept.errors) == ([first, second, third], [], 3)
    assert check(tmp_path, 12, "another run").bad == [first, second, third]
    assert check(tmp_path, 11).bad == [third]
    content = (tmp_path / second.name).read_bytes()
    generator = random.Random(0)
    for _ in range(100):
        position, cut = generator.randrange(len(content)), generator.random() < 0.3
        changed = bytearray(content)
        changed[position] ^= 1 << generator.randrange(8)
        (tmp_path / second.name).write_bytes(content[:position] if cut else bytes(changed))
        kept = check(tmp_path, 15)
        assert ([each.part for each in kept.slices], kept.bad, kept.errors) == ([first, third], [second], 2)
        assert kept.missing == [range(4, 8), range(12, 15)]
        with pytest.raises(ResumeError, match="is damaged"):
            merged([Slice(first, 0, 4), Slice(second, 4, 8)], tmp_path)


def test_a_renamed_part_is_not_taken_over(tmp_path: Path) -> None:
    first = write(tmp_path, 0, 4)
    moved = first.name.replace("-000000000000-000000000004", "-000000000006-000000000010")
    (tmp_path / moved).write_bytes((tmp_path / first.name).read_bytes())
    kept = check(tmp_path, 20)
    assert [each.part for each in kept.slices] == [first]
    assert [part.name for part in kept.bad] == [moved]


@kinds
@pytest.mark.parametrize(("limit", "most"), [("PART_ROWS", 6), ("PART_BYTES", 1), ("PART_SECONDS", 0.0)])
def test_a_part_is_closed_in_time(kind: str, limit: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    writer = parts.PartWriter(RUN, lambda name, content: written.append(name))
    writer.add(0, rows_from(0, 4, kind))
    assert written == []
    monkeypatch.setattr(parts, limit, most)
    writer.add(4, rows_from(4, 4, kind))
    assert [(part.start, part.stop) for part in parts.named_parts(written)] == [(0, 8)]


def test_nothing_covers_nothing() -> None:
    assert parts.cover([], range(0)) == ([], [])
    assert parts.cover([], range(3)) == ([], [range(3)])
