"""How far float32 sums alone put a network's logits off: a bound that is the same on every machine.

Eager PyTorch's own error depends on the kernels that its processor gets. One with more partial sums is nearer to
float64, so a limit in multiples of that error alone refuses right results on some machines. What follows from the
network alone does not change: add the products of a convolution one after another, and the k-th partial sum, of
variance k σ², is rounded with a relative error of variance u²/3, where u is half a unit in the last place. For n
products that makes a relative error of u √(n/6) on average, and one more u stands for the weights' own rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

UNIT = 2.0**-24  # float32's largest relative rounding error
SEED = 40_000


def sum_error(products: int) -> float:
    """Expected relative error of ``products`` float32 products that are added one after another."""
    return float(UNIT * (1 + products / 6) ** 0.5)


@contextmanager
def float32_sums(network: nn.Module) -> Iterator[None]:
    """Within, every convolution and linear layer of the float64 ``network`` is off by its :func:`sum_error`.

    Normal noise of that size, the same for the same calls, is added to what each layer gives.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def rounded(layer: nn.Conv2d | nn.Linear, _given: Any, y: Tensor) -> Tensor:
        if y.device not in generators:
            generators[y.device] = torch.Generator(y.device).manual_seed(SEED)
        noise = torch.randn(y.shape, generator=generators[y.device], dtype=y.dtype, device=y.device)
        return y + sum_error(layer.weight[0].numel()) * y.square().mean().sqrt() * noise

    hooks = [m.register_forward_hook(rounded) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
