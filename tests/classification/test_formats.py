"""What CSV and JSON Lines hold of every type that a Parquet file can have; what they cannot hold is refused at once."""

from __future__ import annotations

import csv
import decimal
import io
import json
import uuid
from typing import Any

import pyarrow as pa
import pytest

from fastres.classification.copied import check_format
from fastres.classification.formats import CSV, FORMATS, JSON_LINES, PARQUET
from fastres.errors import InputError
from tests.classification.tables import write_pieces

NOT_UTF8 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff\x61", b"ok"]).buffers())
NESTED = pa.struct([("a", pa.list_(pa.binary())), ("t", pa.timestamp("ns"))])
# Column, its values in JSON, and in CSV, where null is an empty cell; None for a column that CSV refuses.
COLUMNS: dict[str, tuple[pa.Array, list[Any], list[str] | None]] = {
    "binary": (pa.array([b"\xff\x00", None]), ["/wA=", None], ["/wA=", ""]),
    "large binary": (pa.array([b"\xff"], pa.large_binary()), ["/w=="], ["/w=="]),
    "fixed binary": (pa.array([b"ab"], pa.binary(2)), ["YWI="], ["YWI="]),
    "binary view": (pa.array([b"ab"], pa.binary_view()), ["YWI="], ["YWI="]),
    "dictionary of binary": (pa.array([b"ab", b"ab"]).dictionary_encode(), ["YWI="] * 2, ["YWI="] * 2),
    "string view": (pa.array(["é\n"], pa.string_view()), ["é\n"], ["é\n"]),
    "not UTF-8": (NOT_UTF8, ["\\xffa", "ok"], ["\\xffa", "ok"]),
    "bool": (pa.array([True, None]), [True, None], ["true", ""]),
    "float": (
        pa.array([float("nan"), float("inf"), -float("inf"), 0.5, None]),
        ["NaN", "Infinity", "-Infinity", 0.5, None],
        ["nan", "inf", "-inf", "0.5", ""],
    ),
    "float16": (pa.array([1.5], pa.float16()), [1.5], ["1.5"]),
    "uint64": (pa.array([2**64 - 1], pa.uint64()), [2**64 - 1], [str(2**64 - 1)]),
    "decimal": (pa.array([decimal.Decimal("1.50")]), ["1.50"], ["1.50"]),
    "nanoseconds": (
        pa.array([1], pa.timestamp("ns")),
        ["1970-01-01 00:00:00.000000001"],
        ["1970-01-01 00:00:00.000000001"],
    ),
    "unknown zone": (
        pa.array([1], pa.timestamp("ms", "Nowhere/Here")),
        ["1970-01-01 00:00:00.001Z"],
        ["1970-01-01 00:00:00.001Z"],
    ),
    "time": (pa.array([1], pa.time64("ns")), ["00:00:00.000000001"], ["00:00:00.000000001"]),
    "date": (pa.array([1], pa.date32()), ["1970-01-02"], ["1970-01-02"]),
    "duration": (pa.array([5], pa.duration("ns")), [5], ["5"]),
    "null": (pa.array([None]), [None], [""]),
    "uuid": (
        pa.ExtensionArray.from_storage(pa.uuid(), pa.array([uuid.UUID(int=5).bytes, None], pa.binary(16))),
        [str(uuid.UUID(int=5)), None],
        [str(uuid.UUID(int=5)), ""],
    ),
    "list": (pa.array([[1.0, float("nan")], None], pa.list_(pa.float32())), [[1.0, "NaN"], None], None),
    "list of bytes": (pa.array([[b"1", None]], pa.list_view(pa.binary())), [["MQ==", None]], None),
    "map": (pa.array([[(b"k", 1)]], pa.map_(pa.binary(), pa.int8())), [[["aw==", 1]]], None),
    "struct": (
        pa.array([{"a": [b"\xff"], "t": 1}, None], NESTED),
        [{"a": ["/w=="], "t": "1970-01-01 00:00:00.000000001"}, None],
        None,
    ),
}  # fmt: skip


def written(table: pa.Table, suffix: str) -> bytes:
    file = io.BytesIO()
    write_pieces(file, suffix, [table.slice(0, 1), table.slice(1)])
    return file.getvalue()


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("name", COLUMNS)
def test_values(name: str) -> None:
    array, values, cells = COLUMNS[name]
    table = pa.table({"column": array})
    for suffix in (PARQUET, JSON_LINES):
        check_format(table.schema, suffix)
    lines = written(table, JSON_LINES).decode().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [{"column": value} for value in values]
    if cells is None:
        with pytest.raises(InputError, match=r"cannot hold the nested column column; write \.parquet or \.jsonl"):
            check_format(table.schema, CSV)
    else:
        check_format(table.schema, CSV)
        rows = list(csv.reader(io.StringIO(written(table, CSV).decode())))
        assert [row[0] if row else "" for row in rows[1:]] == cells
    written(table, PARQUET)


def test_what_no_format_can_hold_is_refused() -> None:
    twins = pa.struct([pa.field("a", pa.int8()), pa.field("a", pa.int8())])
    with pytest.raises(InputError, match="Two fields in column x have the same name"):
        check_format(pa.schema([("x", pa.list_(twins))]), JSON_LINES)
    for suffix in FORMATS:
        with pytest.raises(InputError, match="column x of type month_day_nano_interval"):
            check_format(pa.schema([("x", pa.month_day_nano_interval())]), suffix)
