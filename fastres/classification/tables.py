"""Rows as Arrow tables, and the three files that they become: Parquet, CSV and JSON Lines."""

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
    """The columns of a row: which image it is, what is wrong with it, its best classes, its embedding."""

    identity: pa.Schema
    top_k: int
    categories: tuple[str, ...]
    embedding: int  # numbers in it; 0 for none

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
        """Raise ``InputError`` where the columns do not go into a file of this ``suffix``, or share a name."""
        names = self.schema.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"The columns carried through have names that the output uses itself: {', '.join(twice)}")
        nested = [field.name for field in self.schema if pa.types.is_nested(field.type)]
        if suffix == ".csv" and nested:
            raise InputError(f"A CSV file has no lists, as {', '.join(nested)} needs; write .parquet or .jsonl")

    def rows(
        self,
        identity: pa.RecordBatch,
        errors: Sequence[str | None],
        indices: Tensor,
        scores: Tensor,
        embedding: Tensor | None,
    ) -> pa.RecordBatch:
        """Rows of N images: int64 ``indices`` and float32 ``scores`` ``[N, top_k]``, float32 ``embedding`` ``[N, C]``.

        Where there is an error everything else but the identity is null.
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
    """Writes tables, one after another."""

    def write_table(self, table: pa.Table) -> None: ...


def write_shard(batches: Sequence[pa.RecordBatch], path: Path) -> None:
    """Write a shard, Parquet."""
    pq.write_table(pa.Table.from_batches(batches), path, compression=COMPRESSION)


def merged(shards: Iterable[Path]) -> Iterator[pa.Table]:
    """The rows of ``shards`` as tables of about ``ROW_GROUP`` rows."""
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
    """A writer of ``path`` in the format that ``suffix`` names; ``metadata`` goes into Parquet, as JSON."""
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
