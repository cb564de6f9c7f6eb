"""State dict → Plan: batch norm folded into the convolutions, weights packed KRSC.

``y = γ (conv(x) − μ) / √(σ² + ε) + β`` is a convolution with weight ``w γ / √(σ² + ε)`` and bias
``β − μ γ / √(σ² + ε)``. The fold is done in float64, whatever the checkpoint's dtype, and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .architectures import Architecture, BlockSpec, ConvSpec, block_specs, stem_spec
from .plan import INPUT, LOGITS, Conv, Head, Plan, Stem, Step

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BATCH_NORM_EPSILON = 1e-5

StateDict = Mapping[str, Tensor]
Triple = tuple[float, float, float]


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
    spec = stem_spec(arch)
    weight, bias = _packed(state, spec, dtype)
    imagenet = arch.stem == "imagenet"
    stem = Stem("stem", INPUT, "stem", weight, bias, spec.stride, spec.padding, imagenet, mean, std)
    steps: list[Step] = [stem]
    features = {"stem": "stem"}
    value = "stem"
    for block in block_specs(arch):
        steps += _block_steps(state, arch, block, value, dtype)
        value = features[f"layer{block.stage}"] = block.name
    fc = state["fc.weight"].to(dtype).contiguous()
    steps.append(Head("head", value, LOGITS, fc, state["fc.bias"].to(torch.float32)))
    return Plan(arch, tuple(steps), features)


def _block_steps(
    state: StateDict, arch: Architecture, block: BlockSpec, value: str, dtype: torch.dtype
) -> Iterator[Step]:
    """The steps of one block that reads ``value``; its result is called by the block's name."""
    inner = value
    for spec in block.convs[:-1]:
        yield _conv(state, spec, inner, spec.conv, dtype)
        inner = spec.conv
    residual = value if arch.skip else None
    if block.projection is not None:
        residual = f"{block.name}.downsample"
        yield _conv(state, block.projection, value, residual, dtype, relu=False)
    elif block.pad:
        residual = f"{block.name}.downsample"
        weight = pad_shortcut_weight(block.in_channels, block.out_channels).to(state["fc.weight"].device, dtype)
        bias = torch.zeros(block.out_channels, device=weight.device)
        yield Conv(residual, value, residual, weight, bias, stride=block.stride, relu=False)
    yield _conv(state, block.convs[-1], inner, block.name, dtype, residual=residual)


def _conv(
    state: StateDict,
    spec: ConvSpec,
    value: str,
    output: str,
    dtype: torch.dtype,
    relu: bool = True,
    residual: str | None = None,
) -> Conv:
    weight, bias = _packed(state, spec, dtype)
    name = spec.conv.removesuffix(".0")
    return Conv(name, value, output, weight, bias, spec.stride, spec.padding, spec.groups, relu, residual)


def _packed(state: StateDict, spec: ConvSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, bias = fold_batch_norm(state[f"{spec.conv}.weight"], state, spec.norm)
    return weight.permute(0, 2, 3, 1).to(dtype).contiguous(), bias.to(torch.float32)


def pad_shortcut_weight(in_channels: int, out_channels: int) -> Tensor:
    """Option A of He et al. as a 1×1 convolution, ``[K, 1, 1, C]``: the input's channels, zeros around them.

    The paper leaves open where the zero channels go; here, as in the widely used CIFAR training codes, half of
    them come before the copied channels and half after.
    """
    before = (out_channels - in_channels) // 2
    weight = torch.zeros(out_channels, 1, 1, in_channels)
    weight[before : before + in_channels, 0, 0] = torch.eye(in_channels)
    return weight
