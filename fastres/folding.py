"""State dict → Plan: batch norm folded into the convolutions, weights packed KRSC.

``y = γ (conv(x) − μ) / √(σ² + ε) + β`` is a convolution with weight ``w γ / √(σ² + ε)`` and bias
``β − μ γ / √(σ² + ε)``. The fold is done in float64, whatever the checkpoint's dtype, and rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from .architectures import Architecture, BlockSpec, ConvSpec, block_specs, stem_spec
from .plan import INPUT, LOGITS, Conv, Head, Plan, Stem, Step

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BATCH_NORM_EPSILON = 1e-5

StateDict = Mapping[str, Tensor]
Triple = tuple[float, float, float]
WeightAndBias = tuple[Tensor, Tensor]


def fold_batch_norm(weight: Tensor, state: StateDict, norm: str) -> tuple[Tensor, Tensor]:
    """Fold the batch norm called ``norm`` into ``weight`` ``[K, C, R, S]``; returns float64 weight and bias."""
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

    ``mean`` and ``std`` are per RGB channel, for pixels scaled to [0, 1]; they apply to uint8 input only.
    Biases stay float32, and the weights stay on the device where the state dict is.
    """

    def fold(spec: ConvSpec) -> tuple[Tensor, Tensor]:
        weight, bias = fold_batch_norm(state[f"{spec.conv}.weight"], state, spec.norm)
        return weight.permute(0, 2, 3, 1).to(dtype).contiguous(), bias.to(torch.float32)

    def pad(in_channels: int, out_channels: int) -> tuple[Tensor, Tensor]:
        weight = pad_shortcut_weight(in_channels, out_channels).to(device, dtype)
        return weight, torch.zeros(out_channels, device=device)

    device = next(iter(state.values())).device
    if arch.num_classes:
        fc = (state["fc.weight"].to(dtype).contiguous(), state["fc.bias"].to(torch.float32))
    else:
        fc = (torch.empty(0, arch.features, dtype=dtype, device=device), torch.empty(0, device=device))
    return _assemble(arch, fold, pad, fc, mean, std)


@functools.lru_cache(maxsize=64)
def outline(arch: Architecture, dtype: torch.dtype, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD) -> Plan:
    """The plan of ``arch`` without weight data (tensors on the ``meta`` device): shapes, costs and structure only."""

    def empty(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return torch.empty(shape, dtype=dtype, device="meta"), torch.empty(shape[0], device="meta")

    def fold(spec: ConvSpec) -> tuple[Tensor, Tensor]:
        k, c, r, s = spec.weight_shape
        return empty((k, r, s, c))

    def pad(in_channels: int, out_channels: int) -> tuple[Tensor, Tensor]:
        return empty((out_channels, 1, 1, in_channels))

    return _assemble(arch, fold, pad, empty((arch.num_classes, arch.features)), mean, std)


def _assemble(
    arch: Architecture,
    fold: Callable[[ConvSpec], WeightAndBias],
    pad: Callable[[int, int], WeightAndBias],
    fc: WeightAndBias,
    mean: Triple,
    std: Triple,
) -> Plan:
    """The steps of ``arch``; ``fold`` gives a convolution's weight and bias, ``pad`` those of an option-A shortcut."""
    spec = stem_spec(arch)
    imagenet = arch.stem == "imagenet"
    stem = Stem("stem", INPUT, "stem", *fold(spec), spec.stride, spec.padding, imagenet, mean, std)
    steps: list[Step] = [stem]
    features = {"stem": "stem"}
    value = "stem"
    for block in block_specs(arch):
        steps += _block_steps(arch, block, value, fold, pad)
        value = features[f"layer{block.stage}"] = block.name
    steps.append(Head("head", value, LOGITS, *fc))
    return Plan(arch, tuple(steps), features)


def _block_steps(
    arch: Architecture,
    block: BlockSpec,
    value: str,
    fold: Callable[[ConvSpec], WeightAndBias],
    pad: Callable[[int, int], WeightAndBias],
) -> Iterator[Step]:
    """The steps of one block that reads ``value``; its result is called by the block's name."""

    def conv(spec: ConvSpec, source: str, output: str, relu: bool = True, residual: str | None = None) -> Conv:
        name = spec.conv.removesuffix(".0")
        return Conv(name, source, output, *fold(spec), spec.stride, spec.padding, spec.groups, relu, residual)

    inner = value
    for spec in block.convs[:-1]:
        yield conv(spec, inner, spec.conv)
        inner = spec.conv
    residual = value if arch.skip else None
    shortcut = f"{block.name}.downsample"
    if block.projection is not None:
        yield conv(block.projection, value, shortcut, relu=False)
        residual = shortcut
    elif block.pad:
        weight, bias = pad(block.in_channels, block.out_channels)
        yield Conv(shortcut, value, shortcut, weight, bias, stride=block.stride, relu=False)
        residual = shortcut
    yield conv(block.convs[-1], inner, block.name, residual=residual)


def pad_shortcut_weight(in_channels: int, out_channels: int) -> Tensor:
    """Option A of He et al. as a 1×1 convolution, ``[K, 1, 1, C]``: the input's channels, zeros around them.

    The paper leaves open where the zero channels go; here, as in the widely used CIFAR training codes, half of
    them come before the copied channels and half after.
    """
    before = (out_channels - in_channels) // 2
    weight = torch.zeros(out_channels, 1, 1, in_channels)
    weight[before : before + in_channels, 0, 0] = torch.eye(in_channels)
    return weight
