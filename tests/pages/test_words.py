"""Numbers and names in the words of the report."""

from __future__ import annotations

import math

import pytest

from fastres.pages import words


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.9024, 1, "90.2%"), (1.0, 1, "100%"), (0.0, 2, "0%"), (0.99999, 1, ">99.9%"), (0.00001, 1, "<0.1%"),
        (0.9996, 1, ">99.9%"), (0.9994, 1, "99.9%"), (0.98, 0, "98%"), (None, 1, "–"), (math.nan, 1, "–"),
    ],
)  # fmt: skip
def test_percent(value: float | None, digits: int, text: str) -> None:
    assert words.percent(value, digits) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234"), (31.24, "31.2"), (0.4, "0.400"), (0.0, "0"), (None, "–"), (9.996, "10.0"), (99.96, "100")],
)
def test_significant(value: float | None, text: str) -> None:
    assert words.significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "1.2%"), (3e-7, "3.0e-07"), (0.0, "0%"), (math.inf, "not finite"), (None, "–"), (1.5, "150%")],
)
def test_error(value: float | None, text: str) -> None:
    assert words.error(value) == text


def test_lists_and_counts() -> None:
    assert words.listed(["a"]) == "a"
    assert words.listed(["a", "b", "c"]) == "a, b and c"
    assert words.listed(list("abcdefgh")) == "a, b, c, d and 4 others"
    assert words.count(1, "class", "classes") == "1 class"
    assert words.count(3600, "image") == "3,600 images"
    assert words.between(0.891, 0.91) == "89.1–91.0%"
    assert words.between(None, 0.91) == ""
    assert words.shortened("a" * 30, 10) == "aaaaaa…aaa"


def test_names_of_classes() -> None:
    name = words.ClassNames(["crane", "crane", " ", "dog"])
    shown = [name(index) for index in (0, 1, 2, 3, 4, None)]
    assert shown == ["crane (0)", "crane (1)", "class 2", "dog", "class 4", "–"]
