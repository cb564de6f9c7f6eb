"""Numbers that users pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastres.arguments import image_sides, whole_number
from fastres.errors import InputError


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)], ids=repr)
def test_whole_numbers_of_any_kind(value: Any) -> None:
    found = whole_number(value, "n")
    assert found == 3
    assert type(found) is int
    assert image_sides(value) == (3, 3)


@pytest.mark.parametrize(
    "value",
    [0, -1, True, np.True_, torch.tensor(True), 2.0, 2.5, np.float32(2), torch.tensor(2.0), "2", None, [2], np.ones(2),
     torch.ones(2, dtype=torch.int64)],
    ids=repr,
)  # fmt: skip
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"^n is .*; give a whole number of at least 1$"):
        whole_number(value, "n")
    with pytest.raises(InputError, match=r"^n is .*; give a number of pixels, or a pair \(height, width\)$"):
        image_sides(value, "n")


def test_the_least_number() -> None:
    assert whole_number(0, "n", 0) == 0
    with pytest.raises(InputError, match="n is 1; give a whole number of at least 2"):
        whole_number(1, "n", 2)


def test_sides() -> None:
    assert image_sides((3, np.int32(4))) == image_sides([3, 4]) == image_sides(torch.Size([3, 4])) == (3, 4)
    for other in ((3,), (3, 4, 5), (), (3, 0), (3, 4.0), (True, 4), "34"):
        with pytest.raises(InputError, match="image_size is "):
            image_sides(other)
