"""Accuracy from the answers to labelled images: top-1, top-5, per class, confusions, calibration.

A class's *accuracy* is the share of its images that were answered right (its recall), its *precision* the share of the
answers with this class that were right. *Balanced* accuracy is the mean of the classes' accuracies. *NLL* is the mean
negative logarithm of the label's softmax probability.

The calibration curve compares the confidence, the softmax probability of the answer, with the share of right answers,
in 15 bins of equal width. *ECE*, the expected calibration error, is the mean distance of the two over the images (Guo
et al., "On Calibration of Modern Neural Networks", 2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

BINS = 15
TOP = 5
Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


@dataclass(frozen=True)
class ClassAccuracy:
    """One class: its ``images``, how often it was ``predicted``, and shares, ``None`` where nothing is counted."""

    index: int
    images: int
    predicted: int
    top1: float | None
    top5: float | None
    precision: float | None


@dataclass(frozen=True)
class CalibrationBin:
    """The images whose confidence is in ``(low, high]``: their mean confidence, and the share of right answers."""

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Paired:
    """Two models on the same images: how many only the one answered right, and how many only the other.

    ``p_value`` is McNemar's exact test: the probability of a difference at least as large if both were equally good.
    """

    other: str
    only_this: int
    only_other: int
    p_value: float


@dataclass(frozen=True)
class Accuracy:
    """The accuracy on ``images`` images. ``top1_low`` to ``top1_high`` is the 95 % confidence interval (Wilson's).

    ``unanswered`` images have no answer, because the model gave NaN; these count as wrong.

    ``top5`` is ``None`` if there are fewer than six classes, or fewer than five answers for an image; ``nll`` is
    ``None`` if the label's probability is unknown. ``confusions`` has (label, answer, images) of each pair that
    occurs, right answers included.
    """

    images: int
    unanswered: int
    top1: float
    top1_low: float
    top1_high: float
    top5: float | None
    balanced: float
    nll: float | None
    ece: float | None
    classes: tuple[ClassAccuracy, ...]
    confusions: tuple[tuple[int, int, int], ...]
    calibration: tuple[CalibrationBin, ...]


def accuracy(
    labels: np.ndarray,
    predicted: np.ndarray,
    scores: np.ndarray,
    ranks: np.ndarray,
    label_scores: np.ndarray,
    num_classes: int,
    answers: int,
) -> Accuracy | None:
    """Return the accuracy on N images, ``None`` if N is 0.

    ``labels`` and ``predicted`` are class indices, ``scores`` the probabilities of the answers, ``ranks`` the places of
    the labels among the classes, 1 for the best, and ``label_scores`` their probabilities; all have the length N. A
    label that is not among an image's ``answers`` best classes may have the rank 0 and the probability NaN. An image
    without an answer has −1 in ``predicted``.
    """
    if not len(labels):
        return None
    right, answered = predicted == labels, predicted >= 0
    in_top = (ranks > 0) & (ranks <= TOP) if num_classes > TOP and answers >= TOP else None
    classes = _classes(labels, predicted[answered], right, in_top, num_classes)
    low, high = wilson(int(right.sum()), len(right))
    bins = calibration(scores[answered], right[answered])
    return Accuracy(
        images=len(labels),
        unanswered=int((~answered).sum()),
        top1=float(right.mean()),
        top1_low=low,
        top1_high=high,
        top5=None if in_top is None else float(in_top.mean()),
        balanced=float(np.mean([each.top1 for each in classes if each.top1 is not None])),
        nll=None if np.isnan(label_scores).any() else nll(label_scores),
        ece=expected_calibration_error(bins),
        classes=classes,
        confusions=_confusions(labels[answered], predicted[answered], num_classes),
        calibration=bins,
    )


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % confidence interval of a share: ``right`` of ``count``, at least 1."""
    share, z2 = right / count, Z95**2
    centre, scale = share + z2 / (2 * count), 1 + z2 / count
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def paired(right: np.ndarray, other_right: np.ndarray, other: str) -> Paired:
    """Compare two models. ``right`` and ``other_right``, bool ``[N]``, say which images they answered right."""
    only_this, only_other = int((right & ~other_right).sum()), int((other_right & ~right).sum())
    return Paired(other, only_this, only_other, _mcnemar(only_this, only_other))


def _mcnemar(one: int, other: int) -> float:
    count = one + other
    logarithms = (
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(min(one, other) + 1)
    )
    return min(1.0, 2 * math.fsum(map(math.exp, logarithms)))


def nll(label_scores: np.ndarray) -> float:
    """Return the mean negative logarithm of probabilities. One that is 0 in float64 counts as the least above it."""
    least = np.finfo(np.float64).smallest_subnormal
    return float(-np.log(np.maximum(label_scores.astype(np.float64), least)).mean()) + 0.0  # no -0


def calibration(scores: np.ndarray, right: np.ndarray) -> tuple[CalibrationBin, ...]:
    """Return ``BINS`` bins of the answers by their ``scores``; ``right`` says which answers are right."""
    place = np.clip(np.ceil(scores.astype(np.float64) * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    confidence = np.bincount(place, scores.astype(np.float64), BINS)
    hits = np.bincount(place, right.astype(np.float64), BINS)
    return tuple(
        CalibrationBin(
            bin_ / BINS,
            (bin_ + 1) / BINS,
            int(count),
            float(confidence[bin_] / count) if count else None,
            float(hits[bin_] / count) if count else None,
        )
        for bin_, count in enumerate(counts)
    )


def expected_calibration_error(bins: tuple[CalibrationBin, ...]) -> float | None:
    """Return the distance between confidence and accuracy of the bins, the mean over the images."""
    total = sum(each.images for each in bins)
    distances = (
        each.images * abs(each.confidence - each.accuracy)
        for each in bins
        if each.confidence is not None and each.accuracy is not None
    )
    return sum(distances) / total if total else None


def _classes(
    labels: np.ndarray, predicted: np.ndarray, right: np.ndarray, in_top: np.ndarray | None, count: int
) -> tuple[ClassAccuracy, ...]:
    images, answers = np.bincount(labels, minlength=count), np.bincount(predicted, minlength=count)
    hits = np.bincount(labels[right], minlength=count)
    among = None if in_top is None else np.bincount(labels[in_top], minlength=count)
    return tuple(
        ClassAccuracy(
            index,
            int(images[index]),
            int(answers[index]),
            _share(hits[index], images[index]),
            None if among is None else _share(among[index], images[index]),
            _share(hits[index], answers[index]),
        )
        for index in range(count)
    )


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def _confusions(labels: np.ndarray, predicted: np.ndarray, count: int) -> tuple[tuple[int, int, int], ...]:
    cells, counts = np.unique(labels * count + predicted, return_counts=True)
    return tuple((int(c // count), int(c % count), int(n)) for c, n in zip(cells, counts, strict=True))
