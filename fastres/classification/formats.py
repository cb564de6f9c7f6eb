"""The formats of the output: Parquet, CSV and JSON Lines. Only Parquet needs pyarrow."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, Protocol

from fastres.errors import InputError, OutputError
from fastres.storage.urls import MISTAKEN, is_mistaken_url

PARQUET, CSV, JSON_LINES = FORMATS = (".parquet", ".csv", ".jsonl")
COMPRESSION = "zstd"


def check_output_name(name: str) -> None:
    """Raise ``OutputError`` if ``name``, a path or a URL, has none of the suffixes, or is nearly a URL."""
    if os.path.splitext(name)[1].lower() not in FORMATS:
        raise OutputError(f"The output is {name!r}; use a name that ends in {', '.join(FORMATS)}")
    if is_mistaken_url(name) and not os.path.isdir(os.path.dirname(name) or "."):
        raise OutputError(f"The output {name!r} {MISTAKEN}")


def nested_error(column: str) -> InputError:
    """Return the error of a column of lists or structs in a CSV file."""
    return InputError(f"A CSV file cannot hold the nested column {column}; write .parquet or .jsonl")


class Writer(Protocol):
    """A writer of rows: Arrow tables in a Parquet file, :class:`fastres.classification.lines.Lines` in others."""

    def write_table(self, rows: Any) -> None: ...


def open_writer(
    file: BinaryIO, suffix: str, columns: Any, metadata: Mapping[str, Any]
) -> AbstractContextManager[Writer]:
    """Return a writer to ``file`` in the format of ``suffix``, which does not close ``file``.

    ``columns`` is the Arrow schema of a Parquet file, which stores ``metadata`` as JSON, or the names of the columns.
    """
    if suffix != PARQUET:
        return _TextWriter(file, header(columns, suffix))
    import pyarrow.parquet as pq

    noted = columns.with_metadata({"fastres": json.dumps(metadata)})
    writer: AbstractContextManager[Writer] = pq.ParquetWriter(file, noted, compression=COMPRESSION)
    return writer


class _TextWriter:
    def __init__(self, file: BinaryIO, header: str) -> None:
        self._file = file
        self._file.write(header.encode())

    def __enter__(self) -> _TextWriter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write_table(self, rows: Any) -> None:
        self._file.write("".join(rows.texts).encode())


def header(names: Sequence[str], suffix: str) -> str:
    """Return what comes before the rows of a text file."""
    return f"{','.join(map(quoted, names))}\n" if suffix == CSV else ""


def quoted(text: str) -> str:
    """Return the cell of a text in a CSV file."""
    return '"{}"'.format(text.replace('"', '""'))
