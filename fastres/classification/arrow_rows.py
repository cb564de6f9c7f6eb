"""Rows as Arrow holds them, for Parquet files and for Ray."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from .columns import Columns, Kinds
from .tables import Layout, Results

_TYPES = {str: pa.string(), int: pa.int64()}


def identity_schema(kinds: Kinds) -> pa.Schema:
    """Return the Arrow schema of the columns that identify an image."""
    return pa.schema([pa.field(name, _TYPES[kind]) if isinstance(kind, type) else kind for name, kind in kinds])


def identity_rows(columns: Columns, schema: pa.Schema) -> pa.RecordBatch:
    """Return the values of the columns of ``schema``, which :func:`identity_schema` has made."""
    arrays = [_array(columns[field.name], field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _array(values: Sequence[object] | pa.Array, kind: pa.DataType) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values, kind)


class ArrowRows:
    """Makes the rows of ``layout``; ``schema`` is theirs."""

    def __init__(self, layout: Layout) -> None:
        self._layout, self._identity = layout, identity_schema(layout.identity)
        self._labels = pa.array(layout.categories, pa.string())
        self.schema = pa.schema(self._fields())

    def _fields(self) -> list[pa.Field]:
        fields = [*self._identity, pa.field("error", pa.string())]
        for rank in range(1, self._layout.top_k + 1):
            fields += [
                pa.field(f"label_{rank}", pa.string()),
                pa.field(f"index_{rank}", pa.int32()),
                pa.field(f"score_{rank}", pa.float32()),
            ]
        if self._layout.embedding:
            fields.append(pa.field("embedding", pa.list_(pa.float32(), self._layout.embedding)))
        return fields

    def of(self, results: Results) -> pa.RecordBatch:
        """Return the rows of N images. If an image has an error, all columns but its identity and error are null."""
        failed = np.array([error is not None for error in results.errors])
        arrays = [*identity_rows(results.identity, self._identity).columns, pa.array(results.errors, pa.string())]
        for rank in range(self._layout.top_k):
            index = pa.array(results.indices[:, rank].numpy().astype(np.int32), mask=failed)
            arrays += [self._labels.take(index), index, pa.array(results.scores[:, rank].numpy(), mask=failed)]
        if results.embedding is not None:
            values = pa.array(results.embedding.contiguous().numpy().reshape(-1))
            embedding = pa.FixedSizeListArray.from_arrays(values, self._layout.embedding, mask=pa.array(failed))
            arrays.append(embedding)
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)
