"""Turn grouped convolutions with few channels per group into denser ones.

ResNeXt's groups have 4 to 32 channels; a tensor-core instruction reduces over 16. Merging neighbouring groups into one
block-diagonal group of ``DENSE_GROUP`` channels computes the same sums, with zeros for the products that the grouping
left out, and lets the ordinary kernel run. On an H100 the wasted arithmetic (8-fold for groups of 4) takes less time
than moving the activations: 56×56×128 at 4 channels per group is 0.23 GFLOP dense against 1.6 MB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rules import DENSE_GROUP


def merged_groups(channels: int, groups: int, dense: int = DENSE_GROUP) -> int:
    """Return how many groups to merge into one: the fewest that reach ``dense`` channels and divide ``groups``."""
    merge = 1
    while channels * merge < dense and groups % (merge * 2) == 0:
        merge *= 2
    return merge


def merge_groups(weight: Tensor, groups: int, dense: int = DENSE_GROUP) -> tuple[Tensor, int]:
    """Merge the groups of ``weight`` [groups·K, R, S, C]; return the block-diagonal weight and its group count."""
    k, r, s, c = weight.shape
    merge = merged_groups(c, groups, dense) if groups > 1 else 1
    if merge == 1:
        return weight, groups
    # [groups / merge, merge, K per group, R, S, C], each group's block on the diagonal of (merge, merge)
    blocks = weight.view(groups // merge, merge, k // groups, r, s, c)
    merged = weight.new_zeros(groups // merge, merge, k // groups, r, s, merge, c)
    index = torch.arange(merge, dtype=torch.int64, device=weight.device)
    merged[:, index, :, :, :, index] = blocks.transpose(0, 1)
    return merged.view(k, r, s, merge * c), groups // merge
