"""How far a result may be from the truth: the two measures that all tests share."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest relative rounding error of one number.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

# How much further from float64 than eager PyTorch's own result in the same dtype a network's logits may be.
NETWORK_FACTOR = {torch.float32: 2.0, torch.float16: 1.25, torch.bfloat16: 1.25}


def relative_error(result: Tensor, truth: Tensor) -> float:
    """‖result − truth‖ / ‖truth‖ in float64; NaN or infinity where the result has any."""
    truth = truth.double().cpu()
    return float((result.double().cpu() - truth).norm() / truth.norm())


def kernel_tolerance(dtype: torch.dtype, reduction: int, *, roundings: int = 1, truncates: bool = False) -> float:
    """Largest relative L2 error of one kernel with float32 accumulation over ``reduction`` products.

    ``roundings`` to ``dtype`` happen on the way (one where only the output is rounded); random accumulation errors grow
    with the square root of the reduction. Triton's interpreter ``truncates`` when it makes bfloat16.
    """
    rounding = ROUNDING[dtype] * (2 if truncates and dtype == torch.bfloat16 else 1)
    return roundings * rounding + ROUNDING[torch.float32] * (1 + reduction) ** 0.5
