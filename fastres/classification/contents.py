"""Columns of a Parquet file that hold images: bytes in any of Arrow's forms, or a struct with a field ``bytes``."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from fastres.errors import ImageError

FIELD = "bytes"
_IS_BINARY = tuple(
    getattr(pa.types, name)
    for name in ("is_binary", "is_large_binary", "is_fixed_size_binary", "is_binary_view")
    if hasattr(pa.types, name)
)


def holds_images(kind: pa.DataType) -> bool:
    """Return True if a column of this type can hold images."""
    if isinstance(kind, pa.BaseExtensionType):
        return holds_images(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return holds_images(kind.value_type)
    if pa.types.is_struct(kind):
        index = kind.get_field_index(FIELD)  # -1 if there are several
        return index >= 0 and holds_images(kind.field(index).type)
    return is_binary(kind)


def is_binary(kind: pa.DataType) -> bool:
    """Return True if the values of this type are bytes."""
    return any(check(kind) for check in _IS_BINARY)


def contents(array: pa.Array) -> Iterator[bytes | ImageError]:
    """Yield the image of each row of a column for which :func:`holds_images` is true."""
    while True:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        elif pa.types.is_dictionary(array.type) and not is_binary(array.type.value_type):
            array = array.dictionary_decode()
        elif pa.types.is_struct(array.type):
            array = array.flatten()[array.type.get_field_index(FIELD)]  # it is null where the struct is
        else:
            break
    for value in array:
        data = value.as_py()
        yield ImageError("The row holds no image (null).") if data is None else data
