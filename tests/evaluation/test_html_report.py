"""The report of an evaluation: its numbers are the document's, it is self-contained, and it bears every gap."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from fastres.evaluation.html_report import render
from fastres.pages.words import percent
from tests import html_page
from tests.evaluation import documents

# What the scheme says may be null, by the place in the document.
NULLS = {
    "": ("command", "labels", "reference"),
    "machine": ("gpu",),
    "model": ("accuracy", "agreement", "speed"),
    "accuracy": ("top5", "nll"),
    "agreement": ("same_class", "clear_same_class", "logit_error", "layers"),
    "classes": ("top1", "top5", "precision"),
    "calibration": ("confidence", "accuracy"),
    "mistakes": ("label_score",),
    "disagreements": ("label", "logit_error"),
}


class Page(html_page.Page):
    """Also parse texts, and what pictures and headers say. Raise an error for scripts in attributes."""

    def __init__(self, text: str) -> None:
        self.alts: list[str | None] = []
        self.scopeless: list[str] = []
        self._texts: list[str] = []
        super().__init__(text)
        self.text = "".join(self._texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), "an attribute is given twice"
        assert not [name for name in given if name.startswith("on")]
        self.alts += [given.get("alt")] if tag == "img" else []
        self.scopeless += [self.get_starttag_text() or ""] if tag == "th" and "scope" not in given else []
        super().handle_starttag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self._texts.append(data)
            super().handle_data(data)


def page(document: Mapping[str, Any], pictures: Mapping[int, str] | None = None) -> Page:
    return Page(render(document, pictures or {}))


def cell(found: Page, row: str, column: str) -> str:
    """Return a cell of the first table that has the column, in the row that begins with ``row``."""
    start = next(place for place, cells in enumerate(found.rows) if column in cells)
    names = found.rows[start]
    return next(cells for cells in found.rows[start + 1 :] if cells[0].startswith(row))[names.index(column)]


def test_the_numbers_are_those_of_the_document() -> None:
    given = documents.digits()
    found = page(given)
    for entry in given["models"]:
        accuracy, name = entry["accuracy"], entry["name"]
        assert cell(found, name, "top-1") == f"{accuracy['top1']:.1%}"
        assert cell(found, name, "balanced") == f"{accuracy['balanced']:.1%}"
        assert cell(found, name, "ECE") == f"{accuracy['ece']:.1%}"
        assert cell(found, name, "images/s") == f"{entry['speed']['images_per_s']:,.0f}"
        interval = f"{100 * accuracy['top1_low']:.1f}–{accuracy['top1_high']:.1%}"
        assert cell(found, name, "95% interval") == interval
        assert f"95% interval: {interval}" in found.text
        for word, of_class in zip(documents.DIGITS, accuracy["classes"], strict=True):
            shares = [percent(of_class[key]) for key in ("top1", "top5", "precision")]
            row = [word, str(of_class["images"]), *shares, str(of_class["predicted"])]
            assert row in [cells[:6] for cells in found.rows]
        cells = {(label, predicted): number for label, predicted, number in accuracy["confusions"]}
        for label, word in enumerate(documents.DIGITS):
            numbers = [str(cells.get((label, predicted), "")) for predicted in range(10)]
            assert [word, *numbers, str(accuracy["classes"][label]["images"])] in found.rows
    for layer in given["models"][1]["agreement"]["layers"]:
        assert any(row[0] == layer["name"] for row in found.rows)
    assert ["5", "3/broken.jpg", "cannot identify image file"] in found.rows
    assert "10 folders, named as the model's classes" in found.text


def test_the_best_values_are_marked() -> None:
    text = render(documents.digits(), {})
    best = re.findall(r'class="best">([^<]*)<', text)
    assert "2,410" in best
    assert "812" not in best
    assert "0.400" not in best, "all are equal"


def test_mistakes_and_disagreements_are_cards() -> None:
    given = documents.digits()
    pictures = documents.thumbnails(given)
    absent = given["models"][0]["mistakes"][0]["row"]
    shown = {row: data for row, data in pictures.items() if row != absent}
    found = page(given, shown)
    wanted = [entry["row"] for model in given["models"] for key in ("mistakes", "disagreements")
              for entry in model[key]]  # fmt: skip
    assert found.sources == [pictures[row] for row in wanted if row != absent]
    assert all(found.alts)
    assert found.text.count("no picture") == wanted.count(absent)
    assert "no picture" not in page(given).text, "without any picture, no card has room for one"
    first = given["models"][0]["mistakes"][0]
    assert re.search(
        rf"answer ✗{documents.DIGITS[first['predicted']]}{first['score']:.1%}\s*"
        rf"label{documents.DIGITS[first['label']]}{first['label_score']:.1%}\s*{first['name']}",
        found.text,
    )


@pytest.mark.parametrize("make", ["digits", "two_classes", "large", "unlabelled", "empty", "nasty"])
def test_it_needs_nothing_else(make: str) -> None:
    given = getattr(documents, make)()
    text = render(given, documents.thumbnails(given))
    text.encode()
    found = Page(text)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not found.tags & {"script", "link", "iframe", "object", "i", "b>"}
    assert all(source.startswith("data:image/jpeg;base64,") for source in found.sources)
    assert len(found.ids) == len(set(found.ids))
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    assert all(link.startswith("#") for link in found.links)
    assert found.scopeless == []


def test_text_is_not_markup() -> None:
    given = documents.nasty()
    text = render(given, {})
    found = Page(text)
    assert "<script" not in text
    assert "script" not in found.tags
    assert "img" not in found.tags
    assert "\x00" not in text
    assert r"<script>alert(1)</script> & “猫” \x00\xd83d" in found.text
    assert "<i>as text</i>: '1', '10', '2'" in found.text
    assert {"two (1)", "two (2)", "class 3", "</title>"} <= {row[0] for row in found.rows}
    assert "an exported file has no layers" in found.text


def test_doubts_are_next_to_the_verdict() -> None:
    assert "Can this be right?" not in page(documents.digits()).text
    given = documents.digits()
    given["models"][0]["accuracy"]["confusions"] = [[label, (label + 3) % 10, 50] for label in range(10)]
    assert "The labels may be in another order than the model's classes" in page(given).text


def test_large_runs_are_light() -> None:
    given = documents.large()
    text = render(given, {})
    assert len(text.encode()) < 5_000_000
    found = Page(text)
    assert "Confusion matrix" not in text
    assert "The 30 most frequent of" in found.text
    listed = [row for row in found.rows if row[0] == "a class with a name 5, also known as the 5th" and len(row) == 7]
    assert len(listed) == len(given["models"])
    assert "3 of 1,000 classes have no images" in found.text


def test_many_classes_are_cut() -> None:
    given = documents.large(models=1, classes=20_000, images=60_000)
    text = render(given, {})
    assert len(text.encode()) < 1_000_000
    assert re.search(r"\d+ classes are left out", text)


def places(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the parts of a document in which values may be null, by the name in NULLS."""
    models = document["models"]
    parts = {"": [document], "machine": [document["machine"]], "model": models}
    for name in ("accuracy", "agreement"):
        parts[name] = [model[name] for model in models if model[name]]
    for name in ("classes", "calibration"):
        parts[name] = [entry for accuracy in parts["accuracy"] for entry in accuracy[name]]
    for name in ("mistakes", "disagreements"):
        parts[name] = [entry for model in models for entry in model[name]]
    return parts


@pytest.mark.parametrize(("part", "key"), [(part, key) for part, keys in NULLS.items() for key in keys])
def test_every_value_may_be_absent(part: str, key: str) -> None:
    """In every model, and in the first one only."""
    for whole in (True, False):
        given = documents.digits()
        found = places(given)[part]
        for entry in found if whole else found[:1]:
            entry[key] = None
        text = page(given).text
        assert "None" not in text
        assert "nan" not in text.lower().split()


def test_empty_lists_and_values_that_are_not_finite() -> None:
    given = documents.digits()
    for model in given["models"]:
        model["mistakes"] = model["disagreements"] = []
        model["accuracy"] |= {"classes": [], "confusions": [], "calibration": [], "nll": float("nan")}
        if model["agreement"]:
            model["agreement"] |= {"logit_error": float("inf"), "images": 0}
            model["agreement"]["layers"] = [{"name": "conv1", "error": float("nan")}]
    given["class_names"] = []
    text = page(given).text
    assert "not finite" in text
    assert "nan" not in text.lower().split()


def test_no_readable_images() -> None:
    found = page(documents.empty())
    assert "No image could be read, so nothing was measured." in found.text
    assert "3 images could not be read." in found.text
    given = documents.digits() | {"images": 0}
    for model in given["models"]:
        model |= {"accuracy": {**model["accuracy"], "images": 0, "confusions": []}, "speed": None, "agreement": None}
    page(given)


def test_without_labels_the_models_are_compared() -> None:
    found = page(documents.unlabelled())
    assert "accuracy is not measured" in found.text
    assert "top-1" not in found.text
    assert cell(found, "resnet20 fastres bfloat16", "same class") == "98.2%"
    assert "✓" not in found.text


def test_all_answers_right_and_one_class() -> None:
    labels = np.zeros(12, dtype=np.int64)
    entry = documents.model("resnet18 fastres float32", labels, 1, 0.0, 10.0, compared=False)
    text = page(documents.document([entry], ["only"], 12)).text
    assert "classifies 100% of 12 images correctly" in text
    assert "No answer is wrong." in text
    other = copy.deepcopy(entry) | {"name": "another fastres float32"}
    assert "All 2 models are equally accurate" in page(documents.document([entry, other], ["only"], 12)).text
