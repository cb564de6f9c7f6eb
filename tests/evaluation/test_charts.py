"""The charts of the report: valid XML with the numbers in it, also for extreme numbers."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from fastres.evaluation import charts
from fastres.evaluation.charts import Point


def parsed(text: str) -> ElementTree.Element:
    """Return the picture; every coordinate is a number, and none lies far outside."""
    assert not re.search(r'"(nan|-?inf)"', text)
    root = ElementTree.fromstring(text)
    width = float(root.attrib["width"])
    for part in root.iter():
        for key in ("x", "x1", "x2", "cx"):
            assert -1 <= float(part.attrib.get(key, 0)) <= width + 1, (part.tag, key)
        assert float(part.attrib.get("width", 0)) >= 0
        assert float(part.attrib.get("height", 0)) >= 0
    return root


def titles(root: ElementTree.Element) -> list[str]:
    return [part.text or "" for part in root.iter() if part.tag == "title"]


@pytest.mark.parametrize(
    "speeds", [(10.0, 20.0), (1.0, 5000.0), (7.0, 7.0), (0.001, 0.0012), tuple(float(2**k) for k in range(8))]
)
def test_scatter(speeds: tuple[float, ...]) -> None:
    points = [Point(f"<model {k}> & 猫", speed, 0.9 + 0.01 * k, 0.88, 0.99) for k, speed in enumerate(speeds)]
    root = parsed(charts.scatter(points))
    assert [f"<model {k}> & 猫" in said for k, said in enumerate(titles(root))] == [True] * len(speeds)


def test_scatter_marks_the_models_that_no_other_beats() -> None:
    root = parsed(charts.scatter([Point("a", 10.0, 0.9, 0.8, 1.0), Point("b", 5.0, 0.8, 0.7, 0.9)]))
    assert [part.attrib["class"] for part in root.iter() if part.tag == "circle"] == ["dot", "dot hollow"]


def test_labels_do_not_cover_each_other() -> None:
    taken: list[tuple[float, ...]] = []
    for _ in range(8):
        box = charts._place(300, 200, 120, taken, (50, 10, 600, 340))
        assert not any(charts._cover(box, other) for other in taken)
        taken.append(box)


def test_perfect_accuracy() -> None:
    parsed(charts.scatter([Point("a", 1.0, 1.0, 1.0, 1.0), Point("b", 2.0, 1.0, 1.0, 1.0)]))
    parsed(charts.interval(1.0, 1.0, 1.0, (0.998, 1.0), 1.0))
    parsed(charts.interval(None, 0.5, None, (0.4, 0.6), 0.5))


def test_reliability() -> None:
    bins = [
        {"low": 0.0, "high": 0.5, "images": 0, "confidence": None, "accuracy": None},
        {"low": 0.5, "high": 1.0, "images": 12_345, "confidence": 0.8, "accuracy": 0.75},
    ]
    root = parsed(charts.reliability(bins))
    assert "scores 50% to 100%: 12,345 images, mean score 80.0%, accuracy 75.0%" in titles(root)
    assert "12k" in [part.text for part in root.iter() if part.tag == "text"]
    parsed(charts.reliability([]))


@pytest.mark.parametrize("count", [1, 20, 160])
def test_layers(count: int) -> None:
    layers = [{"name": f"layer{k // 20}.{k}", "error": 0.001 * k} for k in range(count)]
    assert len(titles(parsed(charts.layer_bars(layers)))) == count
    parsed(charts.layer_bars([{"name": "a<b", "error": math.nan}, {"name": "fc", "error": 1e-7}]))


def test_ticks_are_round() -> None:
    assert charts._ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert charts._ticks(0.861, 0.88, 4) == pytest.approx([0.865, 0.87, 0.875, 0.88])
    assert charts._powers(0.0, 2.0) == [1, 2, 5, 10, 20, 50, 100]
