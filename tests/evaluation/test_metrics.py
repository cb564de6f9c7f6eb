"""The measures of accuracy, compared with scikit-learn's and with counts by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    log_loss,
    precision_score,
    recall_score,
    top_k_accuracy_score,
)

from fastres.evaluation.metrics import (
    BINS,
    Accuracy,
    accuracy,
    calibration,
    expected_calibration_error,
    nll,
    paired,
    wilson,
)

CLASSES = 12


@pytest.fixture(scope="module")
def answers() -> tuple[np.ndarray, np.ndarray]:
    """Labels and softmax probabilities of 500 images. Class 7 has no image, and is never the answer."""
    random = np.random.default_rng(0)
    labels = random.choice([c for c in range(CLASSES) if c != 7], 500)
    logits = random.normal(size=(500, CLASSES)) + 1.5 * np.eye(CLASSES)[labels]
    logits[:, 7] = -9
    scores = np.exp(logits)
    return labels, scores / scores.sum(1, keepdims=True)


def measured(labels: np.ndarray, scores: np.ndarray, most: int = CLASSES) -> Accuracy:
    order = np.argsort(-scores, axis=1, kind="stable")
    places = (order == labels[:, None]).argmax(1) + 1
    own = scores[np.arange(len(labels)), labels]
    ranks, label_scores = np.where(places <= most, places, 0), np.where(places <= most, own, np.nan)
    found = accuracy(labels, order[:, 0], scores.max(1), ranks, label_scores, scores.shape[1], most)
    assert found is not None
    return found


def test_scikit_learns_measures(answers: tuple[np.ndarray, np.ndarray]) -> None:
    labels, scores = answers
    found, predicted, every = measured(labels, scores), scores.argmax(1), range(CLASSES)
    assert found.images == 500
    assert found.top1 == pytest.approx(float(np.mean(predicted == labels)))
    assert found.top5 == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=list(every)))
    assert found.balanced == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found.nll == pytest.approx(log_loss(labels, scores, labels=list(every)))
    matrix = confusion_matrix(labels, predicted, labels=list(every))
    assert {(a, b): n for a, b, n in found.confusions} == {
        (a, b): matrix[a, b] for a in every for b in every if matrix[a, b]
    }
    recall = recall_score(labels, predicted, labels=list(every), average=None, zero_division=np.nan)
    precision = precision_score(labels, predicted, labels=list(every), average=None, zero_division=np.nan)
    for each in found.classes:
        assert each.images == (labels == each.index).sum()
        assert each.predicted == (predicted == each.index).sum()
        assert (math.nan if each.top1 is None else each.top1) == pytest.approx(recall[each.index], nan_ok=True)
        assert (math.nan if each.precision is None else each.precision) == pytest.approx(
            precision[each.index], nan_ok=True
        )
    assert found.classes[7].top1 is found.classes[7].top5 is found.classes[7].precision is None


def test_the_interval_is_wilsons() -> None:
    for right, count in ((0, 1), (1, 1), (1, 7), (450, 500), (500, 500)):
        expected = binomtest(right, count).proportion_ci(method="wilson")
        assert wilson(right, count) == pytest.approx((expected.low, expected.high))


def test_two_models_on_the_same_images() -> None:
    """The p-value is that of the exact binomial test, also for thousands of images."""
    right = np.array([True] * 9 + [False] * 3)
    found = paired(right, ~right, "other")
    assert (found.other, found.only_this, found.only_other) == ("other", 9, 3)
    assert found.p_value == pytest.approx(binomtest(3, 12).pvalue)
    assert paired(right, right, "other").p_value == 1
    many = np.arange(9000) < 4600
    assert paired(many, ~many, "other").p_value == pytest.approx(binomtest(4400, 9000).pvalue)


def test_only_the_best_classes_are_known(answers: tuple[np.ndarray, np.ndarray]) -> None:
    """A file that gives five classes has a top-5 accuracy, but no NLL. One that gives three has neither."""
    labels, scores = answers
    every, five, three = measured(labels, scores), measured(labels, scores, 5), measured(labels, scores, 3)
    assert (five.top1, five.top5, five.nll) == (every.top1, every.top5, None)
    assert (three.top1, three.top5, three.nll) == (every.top1, None, None)


def test_few_classes_have_no_top_5() -> None:
    found = accuracy(
        np.array([0, 1]), np.array([0, 0]), np.array([0.9, 0.6]), np.array([1, 2]), np.array([0.9, 0.4]), 5, 5
    )
    assert found is not None
    assert found.top5 is None
    assert [each.top5 for each in found.classes] == [None] * 5


def test_images_without_an_answer_are_wrong() -> None:
    labels, answers, scores = np.array([0, 0, 2]), np.array([0, -1, -1]), np.array([0.8, np.nan, np.nan])
    found = accuracy(labels, answers, scores, np.array([1, 0, 0]), scores, 3, 3)
    assert found is not None
    assert (found.images, found.unanswered) == (3, 2)
    assert (found.top1, found.balanced, found.nll) == (pytest.approx(1 / 3), 0.25, None)
    assert found.confusions == ((0, 0, 1),)
    assert found.ece == pytest.approx(0.2)
    assert [each.predicted for each in found.classes] == [1, 0, 0]
    none = accuracy(labels, np.full(3, -1), scores, np.zeros(3), scores, 3, 3)
    assert none is not None
    assert none.ece is None


def test_no_images() -> None:
    none = np.array([], dtype=np.int64)
    assert accuracy(none, none, none.astype(float), none, none.astype(float), 10, 5) is None


def test_calibration() -> None:
    """A confidence on the edge of two bins is in the lower one, and 1 is in the last; 0 is in the first."""
    scores = np.array([0.0, 1 / BINS, 1.0, 1.0, 0.99, 0.5])
    right = np.array([False, True, True, False, True, True])
    bins = calibration(scores, right)
    assert [each.images for each in bins] == [2, *[0] * 6, 1, *[0] * 6, 3]
    assert bins[0].accuracy == 0.5
    assert bins[1].accuracy is bins[1].confidence is None
    assert bins[-1].accuracy == pytest.approx(2 / 3)
    expected = (2 * abs(1 / BINS / 2 - 0.5) + abs(0.5 - 1) + 3 * abs(2.99 / 3 - 2 / 3)) / 6
    assert expected_calibration_error(bins) == pytest.approx(expected)


def test_a_probability_of_zero_is_finite() -> None:
    assert nll(np.array([1.0, 0.0])) == pytest.approx(1074 * math.log(2) / 2)
