"""The columns that identify the image of a row, as Python's lists. Arrow is needed only for those of Parquet files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Names and kinds, in order: ``str``, ``int``, or the Arrow field of a column that is copied from Parquet files.
Kinds = tuple[tuple[str, Any], ...]
# The values by name: a list, in which ``None`` is null, or the Arrow array of a copied column.
Columns = Mapping[str, Sequence[Any]]


def copied_fields(kinds: Kinds) -> list[Any]:
    """Return the Arrow fields of the columns that are copied from Parquet files."""
    return [kind for _, kind in kinds if not isinstance(kind, type)]
