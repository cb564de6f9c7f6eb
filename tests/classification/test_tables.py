"""Shards become one table: every row once, in order, in row groups of the requested size."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from fastres.classification import tables


@pytest.mark.parametrize("sizes", [[5], [4, 4, 4], [1, 2, 3, 4, 5], [9, 1, 1], [3, 3, 2]], ids=str)
def test_merged_shards_have_every_row_once(sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROW_GROUP", 4)
    start, shards = 0, []
    for index, size in enumerate(sizes):
        rows = pa.RecordBatch.from_pydict({"row": list(range(start, start + size))})
        # One shard holds the rows of several batches.
        batches = [rows.slice(0, 1), rows.slice(1)] if size > 1 else [rows]
        shards.append(tmp_path / f"{index}.parquet")
        tables.write_shard(batches, shards[-1])
        start += size
    found = list(tables.merged(shards))
    assert [row for table in found for row in table.column("row").to_pylist()] == list(range(start))
    assert all(table.num_rows >= 4 for table in found[:-1])
