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
from fastres.network.architectures import Architecture, BlockSpec, ConvSpec, block_specs, stem_specs
from fastres.network.normalisation import Triple
from fastres.network.plan import LOGITS, POOLED

Tensors = Mapping[str, Tensor]


def normalised(x: Tensor, dtype: torch.dtype, mean: Triple, std: Triple) -> Tensor:
    """Return images ``[N, 3, H, W]`` in ``dtype``; uint8 pixels are normalised in float32."""
    if x.dtype == torch.uint8:
        means, stds = (torch.tensor(v, dtype=torch.float32, device=x.device).view(1, 3, 1, 1) for v in (mean, std))
        x = (x.to(torch.float32) / 255 - means) / stds
    return x.to(dtype)


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
    network = _Network(tensors if dtype == torch.float32 else {k: t.to(dtype) for k, t in tensors.items()}, arch)
    values = {"stem": network.stem(x)}
    value = values["stem"]
    for block in block_specs(arch):
        value = values[block.name] = network.block(value, block)
    values[POOLED] = value.mean((2, 3))
    if arch.num_classes:
        head = functional.linear(values[POOLED], network.tensors["fc.weight"], network.tensors["fc.bias"])
        values[LOGITS] = head.to(torch.float32)
    return [values[output] for output in outputs]


class _Network:
    def __init__(self, tensors: Tensors, arch: Architecture) -> None:
        self.tensors = tensors
        self.arch = arch

    def conv(self, x: Tensor, spec: ConvSpec) -> Tensor:
        """Return convolution and batch norm."""
        weight = self.tensors[f"{spec.conv}.weight"]
        y = functional.conv2d(x, weight, None, spec.stride, spec.padding, groups=spec.groups)
        gamma, beta, mean, variance = (
            self.tensors[f"{spec.norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return functional.batch_norm(y, mean, variance, gamma, beta, eps=BATCH_NORM_EPSILON)

    def stem(self, x: Tensor) -> Tensor:
        for spec in stem_specs(self.arch):
            x = self.conv(x, spec).relu()
        return x if self.arch.stem == "cifar" else functional.max_pool2d(x, 3, 2, 1)

    def block(self, x: Tensor, block: BlockSpec) -> Tensor:
        y = x
        for spec in block.convs[:-1]:
            y = self.conv(y, spec).relu()
        y = self.conv(y, block.convs[-1])
        if block.squeezed:
            y = self.gated(y, block.name)
        if self.arch.skip:
            y = y + self.shortcut(x, block)
        return y.relu()

    def gated(self, y: Tensor, name: str) -> Tensor:
        """Return squeeze-and-excitation of ``y``."""
        gate = y.mean((2, 3), keepdim=True)
        for layer, activation in (("fc1", torch.relu), ("fc2", torch.sigmoid)):
            part = f"{name}.se.{layer}"
            gate = activation(functional.conv2d(gate, self.tensors[f"{part}.weight"], self.tensors[f"{part}.bias"]))
        return y * gate

    def shortcut(self, x: Tensor, block: BlockSpec) -> Tensor:
        if block.pools:
            x = functional.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        if block.projection is not None:
            return self.conv(x, block.projection)
        if block.pad:
            before = (block.out_channels - block.in_channels) // 2
            after = block.out_channels - block.in_channels - before
            return functional.pad(x[:, :, :: block.stride, :: block.stride], (0, 0, 0, 0, before, after))
        return x
