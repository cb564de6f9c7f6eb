"""Rows as the lines of a CSV or JSON Lines file.

The numbers in CSV are the shortest digits that give the same float32. JSON has no NaN and no infinity, so they are the
strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .columns import Columns
from .formats import CSV, quoted
from .tables import Layout, Results

_POSITIONAL = range(-6, 10)  # exponents of numbers that are written without one


@dataclass(frozen=True)
class Lines:
    """Finished rows: the text of each, with its end, and the places of those that have an error."""

    texts: list[str]
    failed: list[int]

    @property
    def num_rows(self) -> int:
        return len(self.texts)

    @cached_property
    def nbytes(self) -> int:
        """About how much memory they take."""
        return sum(map(len, self.texts))

    def slice(self, start: int, length: int) -> Lines:
        """Return the ``length`` rows from ``start`` on."""
        inside = [place - start for place in self.failed if start <= place < start + length]
        return Lines(self.texts[start : start + length], inside)


def packed(parts: Sequence[Lines]) -> bytes:
    """Return lines as the content of a file."""
    texts = [text for part in parts for text in part.texts]
    failed, count = [], 0
    for part in parts:
        failed += [count + place for place in part.failed]
        count += part.num_rows
    return json.dumps({"lines": texts, "errors": failed}, ensure_ascii=False, separators=(",", ":")).encode()


def unpacked(content: bytes) -> Lines:
    """Return the lines that :func:`packed` has written."""
    document = json.loads(content)
    return Lines(document["lines"], document["errors"])


def lines_of(layout: Layout, suffix: str, results: Results) -> Lines:
    """Return the rows of N images. If an image has an error, all its columns except identity and error are null."""
    failed = [error is not None for error in results.errors]
    columns: dict[str, Sequence[Any]] = {**results.identity, "error": results.errors}
    for rank in range(layout.top_k):
        indices, scores = results.indices[:, rank].tolist(), results.scores[:, rank]
        columns[f"label_{rank + 1}"] = _masked([layout.categories[index] for index in indices], failed)
        columns[f"index_{rank + 1}"] = _masked(indices, failed)
        columns[f"score_{rank + 1}"] = _masked(list(scores.numpy()) if suffix == CSV else scores.tolist(), failed)
    if results.embedding is not None:
        columns["embedding"] = _masked(results.embedding.tolist(), failed)
    return Lines(text_lines(columns, suffix), [place for place, is_failed in enumerate(failed) if is_failed])


def _masked(values: Sequence[Any], failed: Sequence[bool]) -> list[Any]:
    return [None if is_failed else value for value, is_failed in zip(values, failed, strict=True)]


def text_lines(columns: Columns, suffix: str) -> list[str]:
    """Return the rows with these columns as lines of CSV or JSON."""
    if suffix == CSV:
        cells = zip(*map(_cells, columns.values()), strict=True)
        return [f"{','.join(row)}\n" for row in cells]
    values = zip(*map(_values, columns.values()), strict=True)
    return [f"{_json(dict(zip(columns, row, strict=True)))}\n" for row in values]


def _cells(values: Sequence[Any]) -> list[str]:
    if isinstance(values, (list, tuple)):
        return list(map(_cell, values))
    from .copied import csv_cells

    return csv_cells(values)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return quoted(value)
    return number_text(value) if isinstance(value, np.floating) else str(value)


def number_text(value: np.floating[Any]) -> str:
    """Return the shortest digits that give ``value`` in its own precision, as Arrow writes them."""
    text = np.format_float_scientific(value, trim="-", exp_digits=1)
    _, _, exponent = text.partition("e")
    return np.format_float_positional(value, trim="-") if exponent and int(exponent) in _POSITIONAL else text


def _values(values: Sequence[Any]) -> Sequence[Any]:
    if isinstance(values, (list, tuple)):
        return values
    from .copied import json_values

    return json_values(values)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """Return ``value`` with strings in place of NaN and infinity, as in the JSON of protocol buffers."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value
