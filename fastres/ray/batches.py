"""Batches of a table in the formats of Ray: a dict of NumPy arrays, a pandas DataFrame or an Arrow table.

Images are bytes, or a struct (a dict in NumPy and pandas) with a field ``bytes``, as in Hugging Face's data sets. The
columns that are added have the same type in every batch, whatever it holds, because Ray joins batches to blocks and
writes blocks to files.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from fastres.classification.contents import FIELD, contents, holds_images
from fastres.errors import ImageError, InputError, near_matches

NULLS = {"O": "", "i": -1, "f": np.nan}  # the values of a Column that stand for null
NO_IMAGE = "The row holds no image (null)."
_ACCEPTED = "use a column of images, which is binary, or a struct with a binary field 'bytes'"


class Column(np.ndarray):
    """A NumPy array of one dimension that Arrow reads with nulls: where it is "", −1 or NaN.

    NumPy has no null. With None in an object array, Arrow would take the type from the other values, and a column
    without any error would have another type than one with errors. A slice of a column is one as well. The result of a
    computation is an ordinary array.
    """

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [np.asarray(value) if isinstance(value, Column) else value for value in inputs]
        return getattr(ufunc, method)(*plain, **options)

    def __arrow_array__(self, type: pa.DataType | None = None) -> pa.Array:
        values = np.asarray(self)
        missing = values != values if values.dtype.kind == "f" else values == NULLS[values.dtype.kind]
        return pa.array(values, type or (pa.string() if values.dtype == object else None), mask=missing.astype(bool))


def column_names(batch: Any) -> list[str]:
    """Return the names of the columns. Raises ``InputError`` if ``batch`` has none of the formats."""
    if isinstance(batch, pa.Table):
        return list(batch.column_names)
    if _is_pandas(batch):
        return [str(name) for name in batch.columns]
    if isinstance(batch, Mapping):
        return list(batch)
    raise InputError(
        f"A batch cannot be a {type(batch).__name__}; pass a dict of NumPy arrays, a pandas DataFrame or an Arrow "
        "table (batch_format='numpy', 'pandas' or 'pyarrow')"
    )


def find_image_column(batch: Any) -> str:
    """Return the column ``image`` if it holds images, or else the only column of ``batch`` that does.

    Raises ``InputError`` if there is none, or if there are several.
    """
    names = column_names(batch)
    fitting = [name for name in names if _fits(batch[name])]
    if "image" in names and ("image" in fitting or _is_empty(batch["image"])):
        return "image"
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InputError(f"Several columns are binary ({', '.join(fitting)}); pass one of them as image_column")
    kinds = ", ".join(f"{name}: {_kind(batch[name])}" for name in names)
    raise InputError(f"None of the columns holds images ({kinds}); {_ACCEPTED}")


def images(batch: Any, name: str) -> list[bytes | ImageError]:
    """Return the image of each row, as the bytes of a file, or an error if the row has none.

    Raises ``InputError`` if there is no column ``name``, or if it does not hold images.
    """
    names = column_names(batch)
    if name not in names:
        raise InputError(f"The batch has no column {name!r} ({', '.join(names)}).{near_matches(name, names)}")
    if names.count(name) > 1:
        raise InputError(f"The batch has several columns {name!r}; rename them")
    column = batch[name]
    if not _fits(column) and not _is_empty(column):
        hint = ""
        if isinstance(column, np.ndarray) and column.ndim > 1:
            hint = ". Decoded images have lost their size; read the files with ray.data.read_binary_files"
        raise InputError(f"Column {name!r} holds {_kind(column)}; {_ACCEPTED}{hint}")
    if isinstance(column, pa.ChunkedArray):
        if pa.types.is_null(column.type):
            return [ImageError(NO_IMAGE)] * len(column)
        return [image for chunk in column.chunks for image in contents(chunk)]
    return [_image(value, name) for value in column]


def with_columns(batch: Any, added: pa.Table, dropped: str | None) -> Any:
    """Return ``batch`` in its own format, with the columns of ``added`` and without the column ``dropped``.

    In NumPy, null is "" in text, −1 in whole numbers and NaN in floating point; a fixed-size list of length C is an
    array ``[N, C]``. In pandas, the columns have the dtype ``ArrowDtype``.
    """
    if isinstance(batch, pa.Table):
        for field in added.schema:
            batch = batch.append_column(field, added.column(field.name))
        return batch if dropped is None else batch.drop_columns([dropped])
    if _is_pandas(batch):
        pandas = sys.modules["pandas"]
        kept = batch if dropped is None else batch.drop(columns=[dropped])
        return kept.assign(**{
            name: pandas.Series(pandas.arrays.ArrowExtensionArray(column), index=batch.index)
            for name, column in zip(added.column_names, added.columns, strict=True)
        })  # fmt: skip
    kept = {name: column for name, column in batch.items() if name != dropped}
    return kept | {name: _to_numpy(added.column(name).combine_chunks()) for name in added.column_names}


def _to_numpy(array: pa.Array) -> np.ndarray:
    kind = array.type
    if pa.types.is_fixed_size_list(kind):
        missing = np.asarray(array.is_null())
        rows = np.full((len(array), kind.list_size), np.nan, np.float32)
        rows[~missing] = array.drop_null().flatten().to_numpy().reshape(-1, kind.list_size)
        return rows
    null = NULLS[np.dtype(kind.to_pandas_dtype()).kind]
    return array.fill_null(null).to_numpy(zero_copy_only=False).view(Column)


def _is_pandas(batch: Any) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(batch, pandas.DataFrame)


def _fits(column: Any) -> bool:
    """Return True if ``column`` holds images. In NumPy and pandas, its first value that is not missing decides."""
    if isinstance(column, pa.ChunkedArray):
        return holds_images(column.type)
    first = _first(column)
    return isinstance(first, (bytes, bytearray, memoryview)) or (isinstance(first, Mapping) and FIELD in first)


def _is_empty(column: Any) -> bool:
    """Return True if every value is missing."""
    return column.null_count == len(column) if isinstance(column, pa.ChunkedArray) else _first(column) is None


def _first(column: Any) -> Any:
    return next((value for value in column if not _is_missing(value)), None)


def _is_missing(value: Any) -> bool:
    pandas = sys.modules.get("pandas")
    is_nan = isinstance(value, (float, np.floating)) and value != value
    return value is None or is_nan or (pandas is not None and value is pandas.NA)


def _image(value: Any, name: str) -> bytes | ImageError:
    if isinstance(value, Mapping) and FIELD in value:
        value = value[FIELD]
    if _is_missing(value):
        return ImageError(NO_IMAGE)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise InputError(f"Column {name!r} holds {type(value).__name__} beside images; {_ACCEPTED}")


def _kind(column: Any) -> str:
    if isinstance(column, pa.ChunkedArray):
        return str(column.type)
    if isinstance(column, np.ndarray) and (column.ndim > 1 or column.dtype != object):
        return f"{column.dtype} {list(column.shape)}" if column.ndim > 1 else str(column.dtype)
    first = _first(column)
    return "nothing but null" if first is None else type(first).__name__
