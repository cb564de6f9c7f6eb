"""Write tables as Parquet, CSV or JSON Lines.

Parquet keeps every type. In CSV and JSON Lines, bytes are base64, times are ISO 8601 with all their digits, durations
are counts of their unit, and text that is not UTF-8 has ``\\xe9`` in place of its bad bytes. JSON has no NaN and no
infinity, so they are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``. CSV cannot hold nested columns.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from fastres.errors import InputError, OutputError
from fastres.storage.urls import MISTAKEN, is_mistaken_url

from .contents import is_binary

PARQUET, CSV, JSON_LINES = FORMATS = (".parquet", ".csv", ".jsonl")
COMPRESSION = "zstd"


def check_output_name(name: str) -> None:
    """Raise ``OutputError`` if ``name``, a path or a URL, has none of the suffixes, or is nearly a URL."""
    if os.path.splitext(name)[1].lower() not in FORMATS:
        raise OutputError(f"The output is {name!r}; use a name that ends in {', '.join(FORMATS)}")
    if is_mistaken_url(name) and not os.path.isdir(os.path.dirname(name) or "."):
        raise OutputError(f"The output {name!r} {MISTAKEN}")


class Writer(Protocol):
    """A writer of tables, one after another."""

    def write_table(self, table: pa.Table) -> None: ...


def check_format(schema: pa.Schema, suffix: str) -> None:
    """Raise ``InputError`` if a file with this ``suffix`` cannot hold the columns of ``schema``."""
    for field in schema:
        kind = value_type(field.type)
        if suffix == CSV and (pa.types.is_nested(kind) or _is_view_of_lists(kind)):
            raise InputError(f"A CSV file cannot hold the nested column {field.name}; write .parquet or .jsonl")
        if suffix == JSON_LINES and _has_twins(kind):
            raise InputError(f"Two fields in column {field.name} have the same name; write .parquet")
        try:
            column = pa.table({field.name: pa.nulls(2, field.type)}).slice(1)
            for each in {suffix, PARQUET}:  # parts are Parquet
                with open_writer(io.BytesIO(), each, column.schema, {}) as writer:
                    writer.write_table(column)
        except (pa.ArrowException, NotImplementedError, TypeError, ValueError) as error:
            raise InputError(
                f"A {suffix} file cannot hold column {field.name} of type {field.type} ({error}); leave it out"
            ) from error


def open_writer(
    file: BinaryIO, suffix: str, schema: pa.Schema, metadata: Mapping[str, Any]
) -> AbstractContextManager[Writer]:
    """Return a writer to ``file`` in the format of ``suffix``; Parquet files store ``metadata`` as JSON.

    The writer does not close ``file``.
    """
    if suffix == PARQUET:
        noted = schema.with_metadata({"fastres": json.dumps(metadata)})
        writer: AbstractContextManager[Writer] = pq.ParquetWriter(file, noted, compression=COMPRESSION)
        return writer
    return _Csv(file, schema) if suffix == CSV else _JsonLines(file)


class _Csv:
    def __init__(self, file: BinaryIO, schema: pa.Schema) -> None:
        fields = [pa.field(field.name, _writable(pa.array([], field.type)).type) for field in schema]
        self._writer = pyarrow.csv.CSVWriter(file, pa.schema(fields))

    def __enter__(self) -> _Csv:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write_table(self, table: pa.Table) -> None:
        columns = [_writable(column.combine_chunks()) for column in table.columns]
        self._writer.write_table(pa.table(columns, names=table.column_names))


class _JsonLines:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def __enter__(self) -> _JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write_table(self, table: pa.Table) -> None:
        names = table.column_names
        columns = [_values(column.combine_chunks()) for column in table.columns]
        lines = [_json(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]
        self._file.write("".join(f"{line}\n" for line in lines).encode())


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """Return ``value`` with strings in place of NaN and infinity, as in the JSON of protocol buffers."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


# -- columns as numbers and text -----------------------------------------------------------------------------


def _values(array: pa.Array) -> list[Any]:
    """Return the values of a column for JSON; structs are dicts, maps are lists of pairs."""
    kind = value_type(array.type)
    if not pa.types.is_nested(kind) or _is_plain(kind):
        return list(_writable(array).to_pylist())
    return [_nested(value) for value in array]


def _nested(scalar: pa.Scalar) -> Any:
    if isinstance(scalar, pa.ExtensionScalar):
        return _nested(scalar.value) if scalar.is_valid else None
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if pa.types.is_struct(kind):
        return {name: _nested(value) for name, value in scalar.items()}
    if pa.types.is_map(kind):
        return [[_nested(entry[0]), _nested(entry[1])] for entry in scalar.values]
    if pa.types.is_nested(kind):
        return [_nested(value) for value in scalar.values]
    return _writable(pa.array([scalar], kind)).to_pylist()[0]


def _writable(array: pa.Array) -> pa.Array:
    """Return a column with values that CSV and JSON can hold."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name == "arrow.uuid":
            return pa.array([None if value is None else str(value) for value in array.to_pylist()], pa.string())
        return _writable(array.storage)
    if pa.types.is_dictionary(kind):
        return _writable(array.dictionary_decode())
    if is_binary(kind):
        texts = [None if value is None else base64.b64encode(value).decode() for value in array.to_pylist()]
        return pa.array(texts, pa.string())
    if is_text(kind):
        return _valid_text(array)
    if pa.types.is_timestamp(kind):
        return _iso_times(array)
    if pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_decimal(kind):
        return array.cast(pa.string())
    if pa.types.is_duration(kind):
        return array.cast(pa.int64())
    return array.cast(pa.float32()) if pa.types.is_float16(kind) else array


def _valid_text(array: pa.Array) -> pa.Array:
    try:
        array.validate(full=True)
        return array.cast(pa.string()) if pa.types.is_string_view(array.type) else array
    except pa.ArrowInvalid:
        values = array.cast(pa.binary()).to_pylist()
        texts = [None if value is None else value.decode("utf-8", "backslashreplace") for value in values]
        return pa.array(texts, pa.string())


def _iso_times(array: pa.Array) -> pa.Array:
    try:
        return array.cast(pa.string())
    except pa.ArrowInvalid:  # a time zone that this machine does not know
        return array.cast(pa.timestamp(array.type.unit, "UTC")).cast(pa.string())


# -- types ---------------------------------------------------------------------------------------------------


def value_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values: without extensions and dictionaries."""
    if isinstance(kind, pa.BaseExtensionType):
        return value_type(kind.storage_type)
    return value_type(kind.value_type) if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_view_of_lists(kind: pa.DataType) -> bool:
    return pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)


def _fields(kind: pa.DataType) -> list[pa.Field]:
    """Return the fields inside a nested type."""
    if pa.types.is_map(kind):
        return [kind.key_field, kind.item_field]
    return [kind.field(index) for index in range(kind.num_fields)]


def _is_plain(kind: pa.DataType) -> bool:
    """Return True for numbers, and for lists of numbers, which ``to_pylist`` converts quickly."""
    if pa.types.is_nested(kind):
        return not (pa.types.is_struct(kind) or pa.types.is_map(kind)) and all(_is_plain(f.type) for f in _fields(kind))
    return pa.types.is_integer(kind) or pa.types.is_float32(kind) or pa.types.is_float64(kind)


def _has_twins(kind: pa.DataType) -> bool:
    """Return True if a struct in ``kind`` has two fields of one name."""
    kind = value_type(kind)
    if not pa.types.is_nested(kind):
        return False
    fields = _fields(kind)
    names = [field.name for field in fields]
    return (pa.types.is_struct(kind) and len(set(names)) < len(names)) or any(_has_twins(f.type) for f in fields)
