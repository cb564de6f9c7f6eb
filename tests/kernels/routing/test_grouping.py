"""Merging small groups into block-diagonal ones computes the same convolution."""

from __future__ import annotations

import pytest
import torch

from fastres.kernels import reference
from fastres.kernels.routing.grouping import merge_groups, merged_groups


@pytest.mark.parametrize(
    ("groups", "c", "k"), [(32, 4, 4), (32, 8, 8), (64, 4, 4), (16, 16, 16), (4, 32, 32), (6, 8, 16), (8, 4, 12)]
)
def test_same_convolution(groups: int, c: int, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, 6, groups * c, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups * k, 3, 3, c, generator=generator, dtype=torch.float64)
    bias = torch.randn(groups * k, generator=generator, dtype=torch.float64)
    merged, fewer = merge_groups(weight, groups)
    assert merged.shape == (groups * k, 3, 3, groups * c // fewer)
    expected = reference.conv2d(x, weight, bias, padding=1, groups=groups)
    result = reference.conv2d(x, merged, bias, padding=1, groups=fewer)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_merges_just_enough() -> None:
    assert merged_groups(4, 32) == 8
    assert merged_groups(8, 32) == 4
    assert merged_groups(32, 32) == 1
    assert merged_groups(4, 2) == 2  # there are only two groups
    assert merged_groups(4, 3) == 1  # three groups cannot be merged in pairs
    weight = torch.randn(64, 3, 3, 64)
    assert merge_groups(weight, 1) == (weight, 1)
