"""Rows as text: numbers and cells are those that pyarrow writes, and JSON is that of the values of an Arrow table."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch

from fastres.classification.arrow_rows import ArrowRows
from fastres.classification.formats import CSV, JSON_LINES, header
from fastres.classification.lines import Lines, lines_of, number_text, packed, unpacked
from fastres.classification.tables import Layout, Results
from fastres.errors import InputError

ODD = ["a,b", 'with "quotes"', "new\nline", "café", "", "a\\b", "\u2028", "tab\t", None]


def results(layout: Layout) -> Results:
    """Odd texts and numbers; every fourth image has an error."""
    count = len(ODD)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(count, layout.top_k, generator=generator) ** 20
    scores[0, 0], scores[2, 0] = float("nan"), 1.0
    return Results(
        {"path": [f"{text}.jpg" for text in ODD], "key": ODD, "row": [*range(count - 1), None]},
        tuple("broken, 'x' \"y\"" if row % 4 == 1 else None for row in range(count)),
        torch.randint(0, 3, (count, layout.top_k), generator=generator),
        scores,
        torch.randn(count, layout.embedding, generator=generator) if layout.embedding else None,
    )


def layout(embedding: int) -> Layout:
    return Layout((("path", str), ("key", str), ("row", int)), 3, ('cat, "the"', "dog\n", "é"), embedding)


def test_csv_is_what_pyarrow_writes() -> None:
    given = results(layout(0))
    file = io.BytesIO()
    pyarrow.csv.write_csv(pa.Table.from_batches([ArrowRows(layout(0)).of(given)]), file)
    lines = lines_of(layout(0), CSV, given)
    assert header(layout(0).names, CSV) + "".join(lines.texts) == file.getvalue().decode()
    assert lines.failed == [1, 5]


@pytest.mark.parametrize("embedding", [0, 2])
def test_json_has_the_values_of_an_arrow_table(embedding: int) -> None:
    given = results(layout(embedding))
    lines = lines_of(layout(embedding), JSON_LINES, given)
    expected = ArrowRows(layout(embedding)).of(given).to_pylist()
    assert expected[0]["score_1"] != expected[0]["score_1"]
    expected[0]["score_1"] = "NaN"
    assert [json.loads(text) for text in lines.texts] == expected
    assert all(text.endswith("\n") and text.count("\n") == 1 for text in lines.texts)


def test_numbers_are_what_pyarrow_writes() -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, 5000, np.uint32).view(np.float32)
    powers = np.array([sign * 10.0**exponent for exponent in range(-45, 39) for sign in (1, -1)], np.float32)
    around = np.concatenate([powers, np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(np.inf))])
    special = np.array([0.0, -0.0, 1.0, 0.5, np.nan, np.inf, -np.inf, 16777216.0], np.float32)
    values = np.concatenate([bits, around, special, generator.random(5000, np.float32)])
    assert list(map(number_text, values)) == pa.array(values).cast(pa.string()).to_pylist()


def test_a_nested_column_is_refused() -> None:
    layout(2).check(JSON_LINES)
    with pytest.raises(InputError, match=r"CSV file cannot hold the nested column embedding; write \.parquet or"):
        layout(2).check(CSV)


def test_parts_and_pieces_keep_the_errors() -> None:
    lines = lines_of(layout(0), CSV, results(layout(0)))
    again = unpacked(packed([lines.slice(0, 2), lines.slice(2, 3), lines.slice(5, 4)]))
    assert again == lines
    assert lines.slice(4, 3) == Lines(lines.texts[4:7], [1])
