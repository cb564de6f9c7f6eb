"""The error that float32 sums alone cause in a network's logits: a bound that is the same on every machine.

Eager PyTorch's own error depends on the kernels that it uses on the processor. One with more partial sums is closer to
float64, so a limit in multiples of that error alone would reject correct results on some machines. The bound here
depends only on the network. If the products of a convolution are added one after another, the k-th partial sum has
variance k σ² and is rounded with a relative error of variance u²/3, where u is half a unit in the last place. For n
products, this gives an average relative error of u √(n/6). One more u accounts for the rounding of the weights.
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
    """Return the expected relative error of adding ``products`` float32 products one after another."""
    return float(UNIT * (1 + products / 6) ** 0.5)


@contextmanager
def float32_sums(network: nn.Module) -> Iterator[None]:
    """Within the context, give every convolution and linear layer of the float64 ``network`` its :func:`sum_error`.

    Normal noise of that size is added to each layer's output. The same calls get the same noise.
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
