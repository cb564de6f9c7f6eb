"""A table that ``fastres.classify`` has written, read in batches: Parquet, CSV or JSON Lines, local or by URL."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv

from fastres.classification.formats import CSV, FORMATS, PARQUET
from fastres.classification.listing import FILES, TAR
from fastres.classification.listing import PARQUET as PARQUET_ROWS
from fastres.classification.parquet_rows import DAMAGE, OpenParquet
from fastres.classification.remote import open_object, shown
from fastres.errors import InputError, SourceError
from fastres.files import open_regular
from fastres.storage.urls import is_url

BATCH = 1 << 16  # rows
_BLOCK = 1 << 22  # bytes of a CSV file that are read at once; no row is longer
REQUIRED = ("path", "error", "label_1", "index_1", "score_1")
TYPES = {
    "path": pa.string(),
    "key": pa.string(),
    "row": pa.int64(),
    "error": pa.string(),
    "label_1": pa.string(),
    "index_1": pa.int64(),
    "score_1": pa.float64(),
    "label_2": pa.string(),
    "score_2": pa.float64(),
}


class ResultTable:
    """The table ``path``, a file or a URL.

    Raises ``SourceError`` if it cannot be read, and ``InputError`` if it is none of ``fastres.classify``, or has no
    classes.
    """

    def __init__(self, path: str) -> None:
        self.path, self.name = path, shown(path)
        self._suffix = os.path.splitext(path)[1].lower()
        if self._suffix not in FORMATS:
            raise InputError(f"The table is {self.name!r}; pass a table that ends in {', '.join(FORMATS)}")
        if not is_url(path) and not os.path.exists(path):
            raise SourceError(f"The table {self.name!r} does not exist; check the path")
        self.rows: int | None = None  # known for Parquet
        self.facts: Mapping[str, Any] = {}  # what the run noted; only Parquet has it
        with self._readable():
            self._open()
        if missing := [name for name in REQUIRED if name not in self.names]:
            raise InputError(
                f"{self.name!r} has no column {missing[0]!r}; pass a table of fastres classify with classes "
                "(--top-k of at least 1)"
            )

    def _open(self) -> None:
        if self._suffix == PARQUET:
            with closing(OpenParquet(self.path).file) as file:
                self.names: list[str] = file.schema_arrow.names
                self.rows = file.metadata.num_rows
                self.facts = _facts(file.schema_arrow.metadata)
            return
        with self._opened() as file:
            if self._suffix == CSV:
                self.names = _csv_reader(file, None).schema.names
            else:
                self.names = list(_json_row(file.readline(), 1))

    @property
    def kind(self) -> str:
        """What the images are: files, members of tars, or rows of Parquet files."""
        identity = self.names[: self.names.index("error")]
        return TAR if identity[1:2] == ["key"] else PARQUET_ROWS if identity[1:2] == ["row"] else FILES

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows in order, with those of the ``columns`` that the table has. Raises ``SourceError``."""
        wanted = [name for name in columns if name in self.names]
        schema = pa.schema([(name, TYPES[name]) for name in wanted])
        with self._readable():
            for batch in self._batches(schema):
                yield batch.select(wanted).cast(schema)

    def _batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        if self._suffix == PARQUET:
            with closing(OpenParquet(self.path).file) as file:
                yield from file.iter_batches(BATCH, columns=schema.names, use_threads=False)
            return
        with self._opened() as file:
            if self._suffix == CSV:
                yield from _csv_reader(file, schema)
                return
            lines = enumerate(file, 1)
            while rows := [_json_row(line, number) for number, line in islice(lines, BATCH)]:
                yield pa.RecordBatch.from_pylist([_numbers(row) for row in rows], schema=schema)

    def _opened(self) -> BinaryIO:
        file: Any = open_object(self.path)[0] if is_url(self.path) else open_regular(self.path)
        return io.BufferedReader(file)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except SourceError:
            raise
        except DAMAGE as error:
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
            raise SourceError(
                f"The table {self.name!r} cannot be read: {reason.rstrip('.')}. Check the path, or classify the images "
                "again"
            ) from error


def _facts(metadata: Mapping[bytes, bytes] | None) -> Mapping[str, Any]:
    try:
        found = json.loads((metadata or {}).get(b"fastres", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _csv_reader(file: BinaryIO, schema: pa.Schema | None) -> pyarrow.csv.CSVStreamingReader:
    """Return a reader of the columns in ``schema``, or of all."""
    return pyarrow.csv.open_csv(
        file,
        read_options=pyarrow.csv.ReadOptions(block_size=_BLOCK, use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            include_columns=schema.names if schema else None,
            column_types=schema or {},
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


def _json_row(line: bytes, number: int) -> dict[str, Any]:
    row = json.loads(line) if line.strip() else None
    if not isinstance(row, dict):
        raise ValueError(f"line {number:,} is no JSON object")
    return row


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of JSON Lines with scores as numbers: NaN and infinity are strings there."""
    return row | {name: float(row[name]) for name in ("score_1", "score_2") if isinstance(row.get(name), str)}
