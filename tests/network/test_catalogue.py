"""``fastres.list_models``: every architecture, by pattern and by whether weights are published."""

from __future__ import annotations

import pytest

import fastres
from fastres.errors import InputError
from fastres.network.architectures import ARCHITECTURES
from fastres.weights.published import entries


def test_all_models_in_the_order_of_the_family() -> None:
    assert fastres.list_models() == list(ARCHITECTURES)


def test_patterns() -> None:
    assert fastres.list_models("resnet5*") == ["resnet50", "resnet50d", "resnet56"]
    assert fastres.list_models(["wide*2", "plain18"]) == ["wide_resnet50_2", "wide_resnet101_2", "plain18"]
    assert fastres.list_models("resnet50") == ["resnet50"]
    assert fastres.list_models("vgg*") == []


def test_models_with_published_weights() -> None:
    assert fastres.list_models(pretrained=True) == [name for name in ARCHITECTURES if entries(name)]
    assert fastres.list_models("resnet5*", pretrained=True) == ["resnet50"]


@pytest.mark.parametrize("pattern", [50, None, ["resnet*", 18]])
def test_a_pattern_that_is_no_text(pattern: object) -> None:
    with pytest.raises(InputError, match=r"pattern is .*; give a pattern such as 'resnet5\*'"):
        fastres.list_models(pattern)  # type: ignore[arg-type]
