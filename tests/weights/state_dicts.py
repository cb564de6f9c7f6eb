"""State dicts for tests. All tensors differ, so that a tensor in the wrong place is detected."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.network.architectures import get_architecture, state_dict_shapes


def distinct_state(model: str, num_classes: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors with torchvision's names and order, including counters of batches (1, 2, …)."""
    arch = get_architecture(model)
    arch = arch if num_classes is None else arch.with_classes(num_classes)
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for key, shape in state_dict_shapes(arch).items():
        state[key] = torch.randn(shape, generator=generator)
        if key.endswith("running_var"):
            state[key].abs_().add_(0.1)
            state[key.replace("running_var", "num_batches_tracked")] = torch.tensor(len(state))
    return state


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Return True if both have the same names in the same order, and tensors with equal dtypes and bits."""
    return list(left) == list(right) and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )
