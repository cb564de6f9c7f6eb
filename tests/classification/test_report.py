"""What the report of a run says in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastres.classification.report import Report

COUNTS = "out.csv: 1,200 rows, 3 with errors (2.0 s, 600.0 images/s)"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, COUNTS),
        (
            {"resumed": 200, "recomputed": 16, "skipped": 2},
            "out.csv: 1,200 rows, 200 of them from earlier runs, 16 computed again, 3 with errors, "
            "2 images skipped (hidden, or not first in their sample) (2.0 s, 500.0 images/s)",
        ),
        ({"resumed": 1200}, "out.csv: 1,200 rows, all of them computed earlier, 3 with errors (2.0 s)"),
        ({"rows": 0, "errors": 0}, "out.csv: 0 rows, 0 with errors (2.0 s, 0.0 images/s)"),
        ({"shard": "2/3", "missing": 2400}, f"shard 2/3 of {COUNTS}; 2,400 rows of other shards are missing"),
        ({"shard": "2/3"}, f"shard 2/3 of {COUNTS}; the rows of all shards are finished"),
    ],
)
def test_one_line(fields: dict[str, int | str], text: str) -> None:
    given = {"output": Path("out.csv"), "rows": 1200, "errors": 3, "resumed": 0, "seconds": 2.0, **fields}
    assert str(Report(**given)) == text  # type: ignore[arg-type]
