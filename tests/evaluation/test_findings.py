"""The verdict and the warnings of an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastres.evaluation.findings import doubts, mean_score, verdict, warnings
from fastres.pages.words import ClassNames
from tests.evaluation import documents


def run(*tops: tuple[float, float], images: int = 1000, **other: Any) -> dict[str, Any]:
    """Return a document with a model for each pair of top-1 accuracy and images per second."""
    models = []
    for place, (top1, speed) in enumerate(tops):
        low, high = documents.wilson(top1, images)
        models.append({
            "name": "abcdefgh"[place], "accuracy": {"images": images, "top1": top1, "top1_low": low, "top1_high": high},
            "speed": {"images_per_s": speed, "p20_ms": 15900 / speed, "p50_ms": 16000 / speed,
                      "p80_ms": 16100 / speed, "batch": 16},
        })  # fmt: skip
    return {"models": models, "images": images, "labels": {}, "reference": None, **other}


def test_the_most_accurate_and_the_fastest() -> None:
    first, chance, trade = verdict(run((0.90, 100.0), (0.895, 200.0), (0.5, 150.0)))
    assert first == "a is the most accurate: 90.0% of 1,000 images are right. b is the fastest: 200 images/s."
    assert chance == ("The difference between a and b may be chance. c is less accurate beyond chance (95% intervals).")
    assert trade == "b is 2.0 times as fast as a and 0.5 percentage points less accurate, which may be chance."


def test_all_within_the_intervals_or_none() -> None:
    none = "These images do not show that one model is more accurate than another (95% intervals)."
    assert verdict(run((0.90, 100.0), (0.895, 200.0)))[1] == none
    assert verdict(run((0.90, 100.0), (0.895, 200.0), (0.894, 20.0)))[1] == none
    beyond = "It is more accurate than the other model beyond chance (95% intervals)."
    assert verdict(run((0.90, 100.0), (0.5, 200.0)))[1] == beyond


def test_the_same_images_decide() -> None:
    """The intervals overlap, but the model errs only where the other one does as well: that is no chance."""
    given = run((0.90, 100.0), (0.89, 200.0))
    given["models"][1]["paired"] = {"other": "a", "only_this": 0, "only_other": 10, "p_value": 0.002}
    _, chance, trade = verdict(given)
    assert chance == "It is more accurate than the other model beyond chance (McNemar's test on the same images, 5%)."
    assert trade == "b is 2.0 times as fast as a and 1.0 percentage points less accurate."
    given["models"][1]["paired"]["p_value"] = 0.2
    assert "do not show that one model is more accurate" in verdict(given)[1]


def test_what_is_missing() -> None:
    given = run((0.90, 100.0), left_out=[{"name": "b", "reason": "No bfloat16 here"}], unreadable=2, skipped=1)
    given["models"][0]["accuracy"]["unanswered"] = 3
    assert warnings(given, ClassNames([])) == [
        "2 images could not be read. No number below counts what could not be read.",
        "1 image was skipped and not counted.",
        "a gives no answer to 3 images (NaN). These count as wrong.",
        "Left out: b. No bfloat16 here.",
    ]


def test_one_model_is_both() -> None:
    first = verdict(run((0.90, 300.0), (0.8, 200.0)))[0]
    assert first == "a is both the most accurate and the fastest: 90.0% of 1,000 images are right, at 300 images/s."


def test_equal_speeds_are_not_ranked() -> None:
    said = verdict(run((0.90, 100.0), (0.8, 100.4)))
    assert "b and a are about equally fast: up to 100 images/s." in said[0]
    assert not any("times as fast" in text for text in said)


def test_one_model() -> None:
    said = verdict(run((0.90, 100.0)))
    assert said[0] == "a classifies 90.0% of 1,000 images correctly, at 100 images/s."
    assert said[1].startswith("The 95% interval is 88.0–91.7%")


def test_agreement_is_told() -> None:
    given = documents.digits()
    assert verdict(given)[-1] == (
        "The other models give the same class as resnet20 fastres float32 for 93.2% (resnet20 onnx int8) to 98.2% "
        "(resnet20 fastres bfloat16) of the images."
    )


def doubted(given: dict[str, Any]) -> str:
    return " ".join(doubts(given, ClassNames(given["class_names"])))


def answers(predicted: np.ndarray, labels: np.ndarray, classes: int, score: float = 0.9) -> dict[str, Any]:
    entry = documents.model("resnet18 fastres float32", labels, classes, 0.1, 10.0, compared=False)
    entry["accuracy"] = documents.accuracy(labels, predicted, np.full(len(labels), score), classes)
    return documents.document([entry], [f"name {index}" for index in range(classes)], len(labels))


LABELS = np.arange(300) % 12


def test_a_wrong_order_of_the_classes() -> None:
    """Labels that were sorted as text ('1', '10', '11', '2') stand for other classes than the model's."""
    order = sorted(range(12), key=str)
    said = doubted(answers(np.array(order)[LABELS], LABELS, 12))
    assert "The labels may be in another order than the model's classes: for 10 of 12 classes" in said
    assert "“name 10” to those of “name 2”" in said


@pytest.mark.parametrize(
    ("predicted", "score", "said"),
    [
        (np.zeros(300, np.int64), 0.3, "answers “name 0” for 100% of the images"),
        (np.where(np.arange(300) % 25 < 13, LABELS, np.arange(300) * 7 % 11), 0.99, "much surer than it is right"),
        (LABELS, 0.9, ""),
    ],
)
def test_odd_answers(predicted: np.ndarray, score: float, said: str) -> None:
    found = doubted(answers(predicted, LABELS, 12, score))
    assert said in found
    assert bool(said) == bool(found)


def test_no_better_than_a_constant_answer() -> None:
    labels = np.array([0] * 80 + [1] * 20)
    predicted = np.array([0] * 70 + [1] * 20 + [0] * 10)
    assert "no better than always answering “name 0”, which would be right for 80.0%" in doubted(
        answers(predicted, labels, 2, 0.6)
    )


def test_images_and_classes_that_are_missing() -> None:
    given = answers(LABELS, LABELS, 12) | {"unreadable": 2, "skipped": 1}
    given["labels"]["missing"] = [3]
    said = " ".join(warnings(given, ClassNames(given["class_names"])))
    assert "2 images could not be read." in said
    assert "1 image was skipped" in said
    assert "1 of 12 classes has no images that could be read: “name 3”." in said


def test_the_mean_score() -> None:
    given = documents.two_classes()["models"][0]["accuracy"]
    bins = [entry for entry in given["calibration"] if entry["images"]]
    assert mean_score(given) == pytest.approx(sum(b["images"] * b["confidence"] for b in bins) / given["images"])
    assert mean_score({"calibration": []}) is None
