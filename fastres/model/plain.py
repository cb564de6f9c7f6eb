"""The network in PyTorch's own operations, from the unfolded parameters.

``torch.export``, ``torch.jit.trace``, ``torch.fx`` and ``make_fx`` record operations into a program that must run
elsewhere, without fastres. They get these operations, so a program holds its own weights under torchvision's names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode
from torch.nn import functional

from fastres.folding.build import BATCH_NORM_EPSILON
from fastres.network.architectures import NORM_PARTS, Architecture, ConvSpec
from fastres.network.plan import LOGITS, POOLED

from . import unfolded

Tensors = Mapping[str, Tensor]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of ``module`` by name, as tracers know them.

    ``make_fx`` accepts tensors of PyTorch's own classes only, so it gets aliases.
    """
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    if torch.compiler.is_compiling() or get_proxy_mode() is None:
        return tensors
    with disable_proxy_modes_tracing():
        return {name: tensor.detach() for name, tensor in tensors.items()}


def run(x: Tensor, tensors: Tensors, arch: Architecture, outputs: Sequence[str], dtype: torch.dtype) -> list[Tensor]:
    """Return ``outputs`` for normalised images ``x`` ``[N, 3, H, W]`` in ``dtype``, as an executor does.

    ``tensors`` are the parameters and buffers of ``arch`` by torchvision's names.
    """
    if dtype != torch.float32:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    values = unfolded.run(arch, x, _TensorOperations(tensors))
    values[POOLED] = values[POOLED].flatten(1)
    return [values[output].to(torch.float32) if output == LOGITS else values[output] for output in outputs]


class _TensorOperations:
    """The operations on tensors ``[N, C, H, W]``."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def conv_norm(self, x: Tensor, spec: ConvSpec) -> Tensor:
        weight = self.tensors[f"{spec.conv}.weight"]
        y = functional.conv2d(x, weight, None, spec.stride, spec.padding, groups=spec.groups)
        gamma, beta, mean, variance = (self.tensors[f"{spec.norm}.{part}"] for part in NORM_PARTS)
        return functional.batch_norm(y, mean, variance, gamma, beta, eps=BATCH_NORM_EPSILON)

    def pointwise(self, x: Tensor, name: str) -> Tensor:
        return functional.conv2d(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def relu(self, x: Tensor) -> Tensor:
        return x.relu()

    def sigmoid(self, x: Tensor) -> Tensor:
        return x.sigmoid()

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def max_pool(self, x: Tensor) -> Tensor:
        return functional.max_pool2d(x, 3, 2, 1)

    def average_pool(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)

    def mean(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)

    def subsample(self, x: Tensor, stride: int) -> Tensor:
        return x[:, :, ::stride, ::stride]

    def pad_channels(self, x: Tensor, before: int, after: int) -> Tensor:
        return functional.pad(x, (0, 0, 0, 0, before, after))

    def classifier(self, x: Tensor) -> Tensor:
        return functional.linear(x.flatten(1), self.tensors["fc.weight"], self.tensors["fc.bias"])
