"""From the table of an evaluation to its figures: accuracy, agreement, mistakes, disagreements."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fastres.classification.job import transforms_setting

from .agreement import Agreement, agreement
from .candidates import Candidate
from .choices import MOST
from .metrics import Accuracy, Paired, accuracy, paired
from .result import Disagreement, Mistake, ModelResult, Unreadable
from .speed import Speed
from .tables import ERROR, INDEX, LABEL_SCORE, MARGIN, NOISE, RANK, SCORE, Layout

SHOWN = 24  # mistakes and disagreements of a model
ERRORS = 50


@dataclass(frozen=True)
class Summary:
    """The rows of ``table``, which has the columns of ``layout``, summarised."""

    table: pa.Table
    layout: Layout

    def unreadable(self) -> tuple[int, tuple[Unreadable, ...]]:
        """Return the number of images that could not be read, and the first of them."""
        rows = np.flatnonzero(~self._readable)
        column = self.table["error"]
        return len(rows), tuple(
            Unreadable(int(row), self._name(int(row)), column[int(row)].as_py()) for row in rows[:ERRORS]
        )

    def missing(self) -> tuple[int, ...]:
        """Return the classes without an image that could be read."""
        labels = self._labels
        present = np.bincount(labels[labels >= 0], minlength=len(self.layout.class_names))
        return tuple(np.flatnonzero(present == 0).tolist())

    def results(self, speeds: list[Speed] | None) -> tuple[ModelResult, ...]:
        """Return the results of all candidates, without the errors of layers."""
        accuracies = [self._accuracy(candidate) for candidate in self.layout.candidates]
        known = [place for place, found in enumerate(accuracies) if found is not None]
        best = max(known, key=lambda place: accuracies[place].top1, default=None)  # type: ignore[union-attr]
        return tuple(
            ModelResult(
                candidate.name,
                candidate.model,
                candidate.weights,
                candidate.engine,
                candidate.dtype,
                transforms_setting(candidate.transforms),
                accuracies[place],
                None if best in (None, place) else self._paired(place, best),
                self._agreement(place),
                None if speeds is None else speeds[place],
                self._mistakes(candidate),
                self._disagreements(place),
            )
            for place, candidate in enumerate(self.layout.candidates)
        )

    @property
    def _readable(self) -> np.ndarray:
        return self.table["error"].is_null().to_numpy()

    @property
    def _labels(self) -> np.ndarray:
        """The label of each row, −1 for none and for images that could not be read."""
        if not self.layout.labelled:
            return np.full(len(self.table), -1)
        return np.where(self._readable, self._whole("label_index"), -1)

    def _whole(self, name: str) -> np.ndarray:
        return self.table[name].fill_null(-1).to_numpy().astype(np.int64)

    def _real(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy().astype(np.float64)  # null becomes NaN

    def _name(self, row: int) -> str:
        values = (self.table[name][row].as_py() for name in self.layout.identity.names[:2])
        return "/".join(str(value) for value in values if value is not None)

    def _accuracy(self, candidate: Candidate) -> Accuracy | None:
        if not self.layout.labelled:
            return None
        rows = self._labels >= 0
        ranks = np.maximum(self._whole(candidate.column + RANK), 0)
        return accuracy(
            self._labels[rows],
            self._whole(candidate.column + INDEX)[rows],
            self._real(candidate.column + SCORE)[rows],
            ranks[rows],
            self._real(candidate.column + LABEL_SCORE)[rows],
            len(self.layout.class_names),
            MOST if candidate.answers is None else candidate.answers,
        )

    def _paired(self, place: int, best: int) -> Paired:
        own, other = self.layout.candidates[place], self.layout.candidates[best]
        rows = self._labels >= 0
        right, other_right = ((self._whole(each.column + INDEX) == self._labels)[rows] for each in (own, other))
        return paired(right, other_right, other.name)

    def _pair(self, place: int) -> tuple[Candidate, Candidate] | None:
        reference = self.layout.references.get(place)
        return None if reference is None else (self.layout.candidates[place], self.layout.candidates[reference])

    def _agreement(self, place: int) -> Agreement | None:
        if (pair := self._pair(place)) is None:
            return None
        (own, other), rows = pair, self._readable
        return agreement(
            other.name,
            self._whole(own.column + INDEX)[rows],
            self._whole(other.column + INDEX)[rows],
            self._real(own.column + ERROR)[rows],
            self._real(own.column + NOISE)[rows],
            self._real(other.column + MARGIN)[rows],
        )

    def _mistakes(self, candidate: Candidate) -> tuple[Mistake, ...]:
        if not self.layout.labelled:
            return ()
        labels, predicted = self._labels, self._whole(candidate.column + INDEX)
        scores, own = self._real(candidate.column + SCORE), self._real(candidate.column + LABEL_SCORE)
        return tuple(
            Mistake(row, self._name(row), int(labels[row]), int(predicted[row]), float(scores[row]), _known(own[row]))
            for row in _most_confident((labels >= 0) & (predicted >= 0) & (predicted != labels), scores)
        )

    def _disagreements(self, place: int) -> tuple[Disagreement, ...]:
        if (pair := self._pair(place)) is None:
            return ()
        own, other = pair
        predicted, expected = self._whole(own.column + INDEX), self._whole(other.column + INDEX)
        scores, others = self._real(own.column + SCORE), self._real(other.column + SCORE)
        errors, labels = self._real(own.column + ERROR), self._labels
        different = self._readable & (predicted >= 0) & (expected >= 0) & (predicted != expected)
        return tuple(
            Disagreement(
                row,
                self._name(row),
                int(labels[row]) if labels[row] >= 0 else None,
                int(expected[row]),
                float(others[row]),
                int(predicted[row]),
                float(scores[row]),
                _known(errors[row]),
            )
            for row in _most_confident(different, others)
        )


def _most_confident(chosen: np.ndarray, scores: np.ndarray) -> list[int]:
    """Return the chosen rows with the highest scores, highest first; equal ones in the order of the table."""
    rows = np.flatnonzero(chosen)
    return [int(row) for row in rows[np.argsort(-scores[rows], kind="stable")][:SHOWN]]


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
