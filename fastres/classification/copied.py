"""Columns that are copied from Parquet files, as text for CSV and JSON Lines. A CSV file cannot hold nested ones.

Bytes are base64, times are ISO 8601 with all their digits, durations are counts of their unit, and text that is not
UTF-8 has ``\\xe9`` in place of its bad bytes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from fastres.errors import InputError

from .contents import is_binary
from .formats import CSV, JSON_LINES, PARQUET, nested_error, open_writer, quoted


def check_format(fields: Iterable[pa.Field], suffix: str) -> None:
    """Raise ``InputError`` if a file with this ``suffix`` cannot hold the columns ``fields``."""
    for field in fields:
        kind = value_type(field.type)
        if suffix == CSV and (pa.types.is_nested(kind) or _is_view_of_lists(kind)):
            raise nested_error(field.name)
        if suffix == JSON_LINES and _has_twins(kind):
            raise InputError(f"Two fields in column {field.name} have the same name; write .parquet")
        try:
            _write_null(field, suffix)
        except (pa.ArrowException, NotImplementedError, TypeError, ValueError) as error:
            raise InputError(
                f"A {suffix} file cannot hold column {field.name} of type {field.type} ({error}); leave it out"
            ) from error


def _write_null(field: pa.Field, suffix: str) -> None:
    column = pa.table({field.name: pa.nulls(2, field.type)}).slice(1)
    with open_writer(io.BytesIO(), PARQUET, column.schema, {}) as writer:  # types that it lacks are in no source
        writer.write_table(column)
    values = column.column(0).combine_chunks()
    if suffix == CSV:
        csv_cells(values)
    elif suffix == JSON_LINES:
        json_values(values)


def csv_cells(array: pa.Array) -> list[str]:
    """Return the cells of a column in a CSV file, as ``pyarrow.csv`` writes them."""
    written = _writable(array)
    cells = written.cast(pa.string()).to_pylist()
    if is_text(written.type):
        return ["" if cell is None else quoted(cell) for cell in cells]
    return ["" if cell is None else cell for cell in cells]


def json_values(array: pa.Array) -> list[Any]:
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
