"""The tables of the report, as rows of text and shares: models side by side, confusions and classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastres.pages.words import ABSENT, digits_for, error, finite, percent, significant

# A confusion matrix with more classes than this is a list of the most frequent confusions.
MOST_CELLS = 40
# Of more classes than these, the others are in a part that is folded up, and then left out.
SHOWN, FOLDED = 50, 950

Model = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A number of every model: its ``cells`` as text, and which of them are the ``best``."""

    title: str
    explained: str
    cells: Sequence[str]
    best: Sequence[bool]


@dataclass(frozen=True)
class Confusion:
    """``count`` images with this ``label`` got this ``predicted`` class, and ``back`` images the other way round."""

    label: int
    predicted: int
    count: int
    share: float
    back: int


@dataclass(frozen=True)
class ClassRow:
    """The numbers of a class, and the class that its images were most often taken for."""

    index: int
    images: int
    top1: float | None
    top5: float | None
    precision: float | None
    predicted: int
    taken_for: int | None
    times: int


@dataclass(frozen=True)
class Matrix:
    """The confusion matrix of the ``classes`` with images or answers: ``rows`` of counts, and the sums both ways."""

    classes: Sequence[int]
    rows: Sequence[Sequence[int]]
    totals: Sequence[int]
    answers: Sequence[int]


def columns(models: Sequence[Model], images: int, reference: str | None) -> list[Column]:
    """Return the columns that compare the models, without those in which no model has a number."""
    digits = digits_for(images)
    made: list[Column] = []

    def add(
        title: str, explained: str, part: str, key: str, text: Callable[[float], str], best: Callable[..., float]
    ) -> None:
        found = [(model.get(part) or {}).get(key) for model in models]
        values = [value for value in map(finite, found) if value is not None]
        if any(value is not None for value in found):
            cells = [ABSENT if value is None else text(value) for value in found]
            ahead = text(best(values)) if len(set(values)) > 1 else None
            made.append(Column(title, explained, cells, [ahead is not None and cell == ahead for cell in cells]))

    def share(value: float) -> str:
        return percent(value, digits)

    add("top-5", "The label is among the five best classes.", "accuracy", "top5", share, max)
    add("balanced", "The mean of the classes' top-1 accuracies: each class counts the same, whatever its images.",
        "accuracy", "balanced", share, max)  # fmt: skip
    add("NLL", "Negative log-likelihood: the mean of −ln(score of the label). 0 is perfect, and lower is better.",
        "accuracy", "nll", significant, min)  # fmt: skip
    add("ECE", "Expected calibration error: how far scores and accuracy lie apart, on average. Lower is better.",
        "accuracy", "ece", percent, min)  # fmt: skip
    add("images/s", "Images per second.", "speed", "images_per_s", significant, max)
    add("ms per batch", "The median time of one batch.", "speed", "p50_ms", significant, min)
    add("first answer, s", "Seconds until the first answer.", "speed", "first_answer_s", significant, min)
    if reference is not None:
        add("same class", f"The share of images to which the model gives the same class as {reference}.",
            "agreement", "same_class", share, max)  # fmt: skip
        add("same, clear", f"The same, for images of which {reference} is clearly sure: the distance between its two "
            "best classes is larger than the noise.", "agreement", "clear_same_class", share, max)  # fmt: skip
        add("logit error", f"How far the outputs are from those of {reference}, relative to their size.",
            "agreement", "logit_error", error, min)  # fmt: skip
    return made


def axis(models: Sequence[Model]) -> tuple[float, float] | None:
    """Return the ends of a common axis for the intervals of top-1 accuracy, with some space around them."""
    known = [value for model in models if (found := model.get("accuracy"))
             for key in ("top1", "top1_low", "top1_high") if (value := finite(found.get(key))) is not None]  # fmt: skip
    if not known:
        return None
    space = max(0.08 * (max(known) - min(known)), 0.002)
    return max(0.0, min(known) - space), min(1.0, max(known) + space)


def matrix(accuracy: Mapping[str, Any]) -> Matrix | None:
    """Return the confusion matrix, or ``None`` if it would be too large to read."""
    cells = {(label, predicted): number for label, predicted, number in accuracy.get("confusions") or []}
    classes = sorted({index for cell in cells for index in cell})
    if not 0 < len(classes) <= MOST_CELLS:
        return None
    rows = [[cells.get((label, predicted), 0) for predicted in classes] for label in classes]
    return Matrix(classes, rows, [sum(row) for row in rows], [sum(column) for column in zip(*rows, strict=True)])


def confusions(accuracy: Mapping[str, Any], most: int = 30) -> tuple[list[Confusion], int]:
    """Return the most frequent confusions, and the number of all pairs that were confused."""
    cells = {(label, predicted): number for label, predicted, number in accuracy.get("confusions") or []}
    images: dict[int, int] = {}
    for (label, _), number in cells.items():
        images[label] = images.get(label, 0) + number
    found = [
        Confusion(label, predicted, number, number / images[label], cells.get((predicted, label), 0))
        for (label, predicted), number in cells.items()
        if label != predicted
    ]
    found.sort(key=lambda pair: (-pair.count, -pair.share, pair.label, pair.predicted))
    return found[:most], len(found)


def wrong(accuracy: Mapping[str, Any]) -> int:
    """Return the number of wrong answers."""
    return sum(number for label, predicted, number in accuracy.get("confusions") or [] if label != predicted)


def class_rows(accuracy: Mapping[str, Any]) -> list[ClassRow]:
    """Return the classes with images or answers, the least accurate first, those without images last."""
    taken: dict[int, tuple[int | None, int]] = {}
    for label, predicted, number in accuracy.get("confusions") or []:
        if label != predicted and number > taken.get(label, (None, 0))[1]:
            taken[label] = predicted, number
    rows = [
        ClassRow(
            entry["index"], entry["images"], finite(entry.get("top1")), finite(entry.get("top5")),
            finite(entry.get("precision")), entry["predicted"],
            *taken.get(entry["index"], (None, 0)),
        )
        for entry in accuracy.get("classes") or []
        if entry["images"] or entry["predicted"]
    ]  # fmt: skip
    rows.sort(key=lambda row: (row.top1 is None, row.top1 or 0.0, -row.images, row.index))
    return rows
