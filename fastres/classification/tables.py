"""Build rows as Arrow tables, and write them as Parquet, CSV or JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from torch import Tensor

from fastres.errors import InputError

FORMATS = (".parquet", ".csv", ".jsonl")
ROW_GROUP = 4096
COMPRESSION = "zstd"


@dataclass(frozen=True)
class Layout:
    """The columns of a row: the identity of the image, its error, its best classes and its embedding."""

    identity: pa.Schema
    top_k: int
    categories: tuple[str, ...]
    embedding: int  # its length; 0 for no embedding

    @property
    def schema(self) -> pa.Schema:
        fields = [*self.identity, pa.field("error", pa.string())]
        for rank in range(1, self.top_k + 1):
            fields += [
                pa.field(f"label_{rank}", pa.string()),
                pa.field(f"index_{rank}", pa.int32()),
                pa.field(f"score_{rank}", pa.float32()),
            ]
        if self.embedding:
            fields.append(pa.field("embedding", pa.list_(pa.float32(), self.embedding)))
        return pa.schema(fields)

    def check(self, suffix: str) -> None:
        """Raise ``InputError`` if a file with this ``suffix`` cannot hold the columns, or if two have the same name."""
        names = self.schema.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(
                f"These columns occur twice, or have names that the output uses itself: {', '.join(twice)}. Leave them "
                "out, or rename them in the Parquet files"
            )
        nested = [field.name for field in self.schema if pa.types.is_nested(field.type)]
        if suffix == ".csv" and nested:
            raise InputError(f"A CSV file cannot hold the nested column {', '.join(nested)}; write .parquet or .jsonl")

    def rows(
        self,
        identity: pa.RecordBatch,
        errors: Sequence[str | None],
        indices: Tensor,
        scores: Tensor,
        embedding: Tensor | None,
    ) -> pa.RecordBatch:
        """Return the rows of N images.

        ``indices`` are int64 and ``scores`` float32, both ``[N, top_k]``; ``embedding`` is float32 ``[N, C]``. If an
        image has an error, all its columns except identity and error are null.
        """
        failed = np.array([error is not None for error in errors])
        arrays = [*identity.columns, pa.array(errors, pa.string())]
        labels = pa.array(self.categories, pa.string())
        for rank in range(self.top_k):
            index = pa.array(indices[:, rank].numpy().astype(np.int32), mask=failed)
            arrays += [labels.take(index), index, pa.array(scores[:, rank].numpy(), mask=failed)]
        if embedding is not None:
            values = pa.array(embedding.contiguous().numpy().reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(values, self.embedding, mask=pa.array(failed)))
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


class Writer(Protocol):
    """A writer of tables, one after another."""

    def write_table(self, table: pa.Table) -> None: ...


def write_shard(batches: Sequence[pa.RecordBatch], path: Path) -> None:
    """Write a shard as Parquet."""
    pq.write_table(pa.Table.from_batches(batches), path, compression=COMPRESSION)


def merged(shards: Iterable[Path]) -> Iterator[pa.Table]:
    """Yield the rows of ``shards`` as tables of about ``ROW_GROUP`` rows."""
    waiting: list[pa.Table] = []
    for shard in shards:
        waiting.append(pq.read_table(shard))
        if sum(table.num_rows for table in waiting) >= ROW_GROUP:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def open_writer(
    path: Path, suffix: str, schema: pa.Schema, metadata: Mapping[str, Any]
) -> AbstractContextManager[Writer]:
    """Return a writer of ``path`` in the format of ``suffix``; Parquet files store ``metadata`` as JSON."""
    if suffix == ".parquet":
        noted = schema.with_metadata({"fastres": json.dumps(metadata, ensure_ascii=False)})
        writer: AbstractContextManager[Writer] = pq.ParquetWriter(path, noted, compression=COMPRESSION)
        return writer
    if suffix == ".csv":
        csv: AbstractContextManager[Writer] = pyarrow.csv.CSVWriter(path, schema)
        return csv
    return _JsonLines(path)


class _JsonLines:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> _JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write_table(self, table: pa.Table) -> None:
        for row in table.to_pylist():
            self._file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
