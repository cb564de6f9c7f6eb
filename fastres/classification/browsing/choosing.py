"""Which images of a table a page shows, found in one pass over the columns of scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastres.terminal import progress_bar

from .table import ResultTable

DOUBTFUL = 5  # one picture in so many is for the view of doubtful images
EACH = 20  # one picture in so many, at most, is for the most certain images of one class; as many for the least certain
ERRORS = 200  # rows with an error that a page lists
_COLUMNS = ("error", "label_1", "index_1", "score_1", "score_2")


@dataclass
class ClassRows:
    """A class, its number of images, the sum of their scores, and the rows to show: the most and the least certain."""

    index: int
    label: str
    images: int = 0
    total_score: float = 0.0
    most: list[int] = field(default_factory=list)
    least: list[int] = field(default_factory=list)

    @property
    def shown(self) -> int:
        return len(self.most) + len(self.least)


@dataclass(frozen=True)
class Chosen:
    """The rows that a page shows. Classes are in the order of their numbers of images, largest first.

    ``errors`` counts the rows with an error; ``error_rows`` are the first of them. ``doubtful`` are the rows with the
    smallest margin between the two best scores, or with the smallest score if ``by_margin`` is false.
    """

    images: int
    errors: int
    classes: list[ClassRows]
    doubtful: list[int]
    error_rows: list[int]
    by_margin: bool

    @property
    def pictures(self) -> list[int]:
        """The rows of all pictures, in order."""
        rows = {row for each in self.classes for row in (*each.most, *each.least)}
        return sorted(rows.union(self.doubtful))


def choose(table: ResultTable, pictures: int, progress: bool) -> Chosen:
    """Choose at most ``pictures`` images of ``table``. Raises ``SourceError`` if it cannot be read."""
    classes: dict[int, ClassRows] = {}
    each = max(pictures // EACH, 1)
    most, least, doubtful = _Smallest(each), _Smallest(2 * each), _Smallest(pictures // DOUBTFUL)
    start = errors = 0
    error_rows: list[int] = []
    with progress_bar(total=table.rows, desc="Reading the table", unit="row", delay=1.0, disable=not progress) as bar:
        for batch in table.batches(_COLUMNS):
            failed = start + _where(batch["error"].is_valid())
            errors += len(failed)
            error_rows += failed[: max(ERRORS - len(error_rows), 0)].tolist()
            sound = pc.and_(batch["error"].is_null(), batch["index_1"].is_valid())
            rows, batch_rows, batch = start + _where(sound), batch.num_rows, batch.filter(sound)
            index, score = batch["index_1"].to_numpy(), _scores(batch["score_1"])
            _count(classes, index, score, batch["label_1"])
            most.add(index, -score, -rows)  # so that among equal scores, these are not the least certain ones
            least.add(index, score, rows)
            margin = score - _scores(batch["score_2"]) if "score_2" in table.names else score
            doubtful.add(np.zeros_like(index), np.where(score < 0, score, margin), rows)
            start += batch_rows
            bar.update(batch_rows)
    ranked = sorted(classes.values(), key=lambda each: (-each.images, each.index))
    found = doubtful.rows().get(0, [])
    most_certain = {index: [-row for row in rows] for index, rows in most.rows().items()}
    _share_out(ranked, most_certain, least.rows(), each, pictures - len(found))
    return Chosen(start, errors, ranked, found, error_rows, "score_2" in table.names)


def _where(mask: pa.BooleanArray) -> np.ndarray:
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False))


def _scores(column: pa.Array) -> np.ndarray:
    """Return scores as float64; -1 in place of NaN and null, which are the least certain of all."""
    return np.nan_to_num(column.to_numpy(zero_copy_only=False).astype(np.float64), nan=-1.0)


def _count(classes: dict[int, ClassRows], index: np.ndarray, score: np.ndarray, labels: pa.Array) -> None:
    numbers, first, inverse, images = np.unique(index, return_index=True, return_inverse=True, return_counts=True)
    totals = np.bincount(inverse, np.maximum(score, 0.0), len(numbers))
    columns = (each.tolist() for each in (numbers, first, images, totals))
    for number, row, count, total in zip(*columns, strict=True):
        if number not in classes:
            classes[number] = ClassRows(number, labels[row].as_py() or f"class {number}")
        classes[number].images += count
        classes[number].total_score += total


class _Smallest:
    """The ``most`` rows of each class with the smallest keys; of equal keys, the first rows."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept = np.empty(0, np.int64), np.empty(0, np.float64), np.empty(0, np.int64)

    def add(self, index: np.ndarray, key: np.ndarray, row: np.ndarray) -> None:
        index, key, row = (np.concatenate(pair) for pair in zip(self._kept, (index, key, row), strict=True))
        order = np.lexsort((row, key, index))
        is_first = np.ones(len(order), bool)
        is_first[1:] = index[order][1:] != index[order][:-1]
        starts = np.flatnonzero(is_first)
        rank = np.arange(len(order)) - starts[np.cumsum(is_first) - 1]
        order = order[rank < self._most]
        self._kept = index[order], key[order], row[order]

    def rows(self) -> dict[int, list[int]]:
        """Return the rows of each class, the smallest key first."""
        found: dict[int, list[int]] = {}
        for index, row in zip(self._kept[0].tolist(), self._kept[2].tolist(), strict=True):
            found.setdefault(index, []).append(row)
        return found


def _share_out(
    ranked: Sequence[ClassRows], most: dict[int, list[int]], least: dict[int, list[int]], each: int, pictures: int
) -> None:
    """Give each class its rows, so that there are at most so many ``pictures`` in all.

    All classes get the same number, as large as possible, of the most and of the least certain: at most ``each``. If
    there is not one of both for every class, large classes come first.
    """
    each = next((n for n in range(each, 1, -1) if sum(min(found.images, 2 * n) for found in ranked) <= pictures), 1)
    for found in ranked:
        if found.images <= 2 * each:
            found.most = least[found.index][::-1][:pictures]
        else:
            found.most = most[found.index][:each][:pictures]
            found.least = least[found.index][:each][: pictures - len(found.most)]
        pictures -= found.shown
