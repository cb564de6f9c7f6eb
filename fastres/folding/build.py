"""Build a Plan from a state dict: fold batch norm into the convolutions and store the weights as KRSC.

``y = γ (conv(x) − μ) / √(σ² + ε) + β`` is a convolution with weight ``w γ / √(σ² + ε)`` and bias
``β − μ γ / √(σ² + ε)``. The fold is computed in float64 for any dtype of the checkpoint and rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastres.network.architectures import Architecture, BlockSpec, ConvSpec, block_specs, stem_specs
from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD, Triple
from fastres.network.plan import INPUT, LOGITS, Conv, Head, Plan, Pool, SqueezeExcite, Stem, Step

BATCH_NORM_EPSILON = 1e-5

StateDict = Mapping[str, Tensor]
WeightAndBias = tuple[Tensor, Tensor]


def fold_batch_norm(weight: Tensor, state: StateDict, norm: str) -> tuple[Tensor, Tensor]:
    """Fold the batch norm called ``norm`` into ``weight`` ``[K, C, R, S]``. Return weight and bias in float64."""
    gamma, beta, mean, variance = (
        state[f"{norm}.{part}"].to(torch.float64) for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / torch.sqrt(variance + BATCH_NORM_EPSILON)
    return weight.to(torch.float64) * scale[:, None, None, None], beta - mean * scale


def build_plan(
    state: StateDict,
    arch: Architecture,
    *,
    dtype: torch.dtype = torch.float32,
    mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD,
) -> Plan:
    """Fold ``state`` (torchvision names, shapes of ``arch``) into a plan whose weights have ``dtype``.

    ``mean`` and ``std`` are per RGB channel, for pixels scaled to [0, 1]. They apply to uint8 input only.
    Biases are float32, and all tensors are on the state dict's device.
    """

    device = next(iter(state.values())).device

    def conv(spec: ConvSpec) -> WeightAndBias:
        weight, bias = fold_batch_norm(state[f"{spec.conv}.weight"], state, spec.norm)
        return weight.permute(0, 2, 3, 1).to(dtype).contiguous(), bias.to(torch.float32)

    def linear(name: str, outputs: int, inputs: int) -> WeightAndBias:
        if not outputs:
            none = torch.empty(0, inputs, dtype=dtype, device=device)
            return none, torch.empty(0, dtype=torch.float32, device=device)
        weight = state[f"{name}.weight"].reshape(outputs, inputs)  # a 1×1 convolution's is [K, C, 1, 1]
        return weight.to(dtype).contiguous(), state[f"{name}.bias"].to(torch.float32)

    def pad(in_channels: int, out_channels: int) -> WeightAndBias:
        weight = pad_shortcut_weight(in_channels, out_channels).to(device, dtype)
        return weight, torch.zeros(out_channels, dtype=torch.float32, device=device)

    return _assemble(arch, _Layers(conv, linear, pad), mean, std)


@functools.lru_cache(maxsize=64)
def outline(arch: Architecture, dtype: torch.dtype, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD) -> Plan:
    """Return the plan of ``arch`` without weight data (tensors on the ``meta`` device): shapes and costs only."""

    def empty(*shape: int) -> WeightAndBias:
        return torch.empty(shape, dtype=dtype, device="meta"), torch.empty(shape[0], dtype=torch.float32, device="meta")

    def conv(spec: ConvSpec) -> WeightAndBias:
        k, c, r, s = spec.weight_shape
        return empty(k, r, s, c)

    def linear(name: str, outputs: int, inputs: int) -> WeightAndBias:
        return empty(outputs, inputs)

    def pad(in_channels: int, out_channels: int) -> WeightAndBias:
        return empty(out_channels, 1, 1, in_channels)

    return _assemble(arch, _Layers(conv, linear, pad), mean, std)


@dataclass(frozen=True)
class _Layers:
    """Functions that return weight and bias: of a convolution with its batch norm, a linear layer, and option A."""

    conv: Callable[[ConvSpec], WeightAndBias]
    linear: Callable[[str, int, int], WeightAndBias]  # name, outputs, inputs
    pad: Callable[[int, int], WeightAndBias]  # channels in and out


def _assemble(arch: Architecture, layers: _Layers, mean: Triple, std: Triple) -> Plan:
    """Build the plan of ``arch`` with weights from ``layers``."""
    steps: list[Step] = list(_stem_steps(arch, layers, mean, std))
    features = {"stem": "stem"}
    value = "stem"
    for block in block_specs(arch):
        steps += _block_steps(arch, block, value, layers)
        value = features[f"layer{block.stage}"] = block.name
    steps.append(Head("head", value, LOGITS, *layers.linear("fc", arch.num_classes, arch.features)))
    return Plan(arch, tuple(steps), features)


def _stem_steps(arch: Architecture, layers: _Layers, mean: Triple, std: Triple) -> Iterator[Step]:
    """Yield one step, or the three convolutions and the pool of a deep stem. The last step writes ``"stem"``."""
    first, *others = stem_specs(arch)
    value = first.conv if others else "stem"
    pool = arch.stem == "imagenet"
    yield Stem("stem", INPUT, value, *layers.conv(first), first.stride, first.padding, pool, mean, std)
    for spec in others:
        yield Conv(spec.conv, value, spec.conv, *layers.conv(spec), spec.stride, spec.padding)
        value = spec.conv
    if others:
        yield _pool("maxpool", value, "stem", "max", layers)


def _pool(name: str, source: str, output: str, mode: Literal["max", "average"], layers: _Layers) -> Pool:
    return Pool(name, source, output, *layers.linear(name, 0, 0), mode)


def _block_steps(arch: Architecture, block: BlockSpec, value: str, layers: _Layers) -> Iterator[Step]:
    """Yield the steps of one block that reads ``value``. Its result has the block's name."""

    def conv(spec: ConvSpec, source: str, output: str, relu: bool = True, residual: str | None = None) -> Conv:
        name = spec.conv.removesuffix(".0")
        return Conv(name, source, output, *layers.conv(spec), spec.stride, spec.padding, spec.groups, relu, residual)

    shortcut = f"{block.name}.downsample"
    projected = value
    if block.pools:  # comes first, so that convolutions that can be joined are neighbours
        projected = f"{shortcut}.0"
        yield _pool(projected, value, projected, "average", layers)
    inner = value
    for spec in block.convs[:-1]:
        yield conv(spec, inner, spec.conv)
        inner = spec.conv
    residual = value if arch.skip else None
    if block.projection is not None:
        yield conv(block.projection, projected, shortcut, relu=False)
        residual = shortcut
    elif block.pad:
        weight, bias = layers.pad(block.in_channels, block.out_channels)
        yield Conv(shortcut, value, shortcut, weight, bias, stride=block.stride, relu=False)
        residual = shortcut
    last = block.convs[-1]
    if not block.squeezed:
        yield conv(last, inner, block.name, residual=residual)
        return
    assert residual is not None
    yield conv(last, inner, last.conv, relu=False)
    squeeze = layers.linear(f"{block.name}.se.fc1", block.squeezed, block.out_channels)
    excite = layers.linear(f"{block.name}.se.fc2", block.out_channels, block.squeezed)
    yield SqueezeExcite(f"{block.name}.se", last.conv, block.name, *squeeze, *excite, residual)


def pad_shortcut_weight(in_channels: int, out_channels: int) -> Tensor:
    """Return option A of He et al. as a 1×1 convolution ``[K, 1, 1, C]``: a copy of the channels, padded with zeros.

    The paper does not say where the zero channels go. Here half of them come before the copied channels and half after,
    as in the widely used CIFAR training codes.
    """
    before = (out_channels - in_channels) // 2
    weight = torch.zeros(out_channels, 1, 1, in_channels, dtype=torch.float32, device="cpu")
    weight[before : before + in_channels, 0, 0] = torch.eye(in_channels, dtype=torch.float32, device="cpu")
    return weight
