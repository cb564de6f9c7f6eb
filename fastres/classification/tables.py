"""The columns of the table, and what its rows are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastres.errors import InputError

from .columns import Columns, Kinds, copied_fields
from .formats import CSV, nested_error


@dataclass(frozen=True)
class Layout:
    """The columns of a row: the identity of the image, its error, its best classes and its embedding."""

    identity: Kinds
    top_k: int
    categories: tuple[str, ...]
    embedding: int  # its length; 0 for no embedding

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        best = [f"{name}_{rank}" for rank in range(1, self.top_k + 1) for name in ("label", "index", "score")]
        return [*(name for name, _ in self.identity), "error", *best, *["embedding"] * bool(self.embedding)]

    def check(self, suffix: str) -> None:
        """Raise ``InputError`` if a file with this ``suffix`` cannot hold the rows, or two columns have one name."""
        refuse_twins(self.names, "output")
        if fields := copied_fields(self.identity):
            from .copied import check_format

            check_format(fields, suffix)
        if self.embedding and suffix == CSV:
            raise nested_error("embedding")
        odd = [name for name in self.categories if self.top_k and name != name.encode(errors="replace").decode()]
        if odd:
            raise InputError(f"The class name {odd[0]!r} is not valid Unicode; correct it")


@dataclass(frozen=True)
class Results:
    """What the rows of N images say.

    ``indices`` are int64 and ``scores`` float32, both ``[N, top_k]``; ``embedding`` is float32 ``[N, C]`` or ``None``.
    They are on the CPU, and without meaning for an image with an error.
    """

    identity: Columns
    errors: Sequence[str | None]
    indices: Tensor
    scores: Tensor
    embedding: Tensor | None


def refuse_twins(columns: Sequence[str], whose: str) -> None:
    """Raise ``InputError`` if two columns have one name. ``whose`` they are if they were not copied."""
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise InputError(
            f"These columns occur twice, or have names that the {whose} uses itself: {', '.join(twice)}. Leave them "
            "out, or rename them in the Parquet files"
        )
