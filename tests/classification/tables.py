"""Write an Arrow table in each format, as a run writes its rows."""

from __future__ import annotations

from typing import BinaryIO

import pyarrow as pa

from fastres.classification.formats import PARQUET, open_writer
from fastres.classification.lines import Lines, text_lines


def write_pieces(file: BinaryIO, suffix: str, pieces: list[pa.Table]) -> None:
    """Write ``pieces`` of one table, whose columns are copied from Parquet files if the format is CSV or JSON Lines."""
    columns = pieces[0].schema if suffix == PARQUET else pieces[0].column_names
    with open_writer(file, suffix, columns, {"model": "m"}) as writer:
        for piece in pieces:
            writer.write_table(piece if suffix == PARQUET else as_lines(piece, suffix))


def as_lines(table: pa.Table, suffix: str) -> Lines:
    copied = {name: table[name].combine_chunks() for name in table.column_names}
    return Lines(text_lines(copied, suffix), [])
