"""The columns of the table, and rows built from the results of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from torch import Tensor

from fastres.errors import InputError

from .formats import check_format


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
        """Raise ``InputError`` if a file with this ``suffix`` cannot hold the rows, or two columns have one name."""
        refuse_twins(self.schema.names, "output")
        check_format(self.schema, suffix)
        odd = [name for name in self.categories if self.top_k and name != name.encode(errors="replace").decode()]
        if odd:
            raise InputError(f"The class name {odd[0]!r} is not valid Unicode; correct it")

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


def refuse_twins(columns: Sequence[str], whose: str) -> None:
    """Raise ``InputError`` if two columns have one name. ``whose`` they are if they were not copied."""
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise InputError(
            f"These columns occur twice, or have names that the {whose} uses itself: {', '.join(twice)}. Leave them "
            "out, or rename them in the Parquet files"
        )
