"""The ResNet family as data: one frozen dataclass, one table.

A network is a stem, stages of residual blocks and a linear head. Each network, such as ResNet-18, ResNeXt-101, a plain
(shortcut-free) network or a CIFAR network, is one row of this table. No other code depends on a model's name. Parameter
names are torchvision's (``conv1``, ``layer1.0.bn2``, ``layer2.0.downsample.0``, ``fc``). Bottlenecks have the stride in
their 3×3 convolution, as in torchvision ("ResNet v1.5").

Sources: He et al., *Deep residual learning for image recognition*, CVPR 2016 (the family, the plain networks, the CIFAR
networks with option-A shortcuts, §4.2); Xie et al., *Aggregated residual transformations*, CVPR 2017 (ResNeXt);
Zagoruyko & Komodakis, *Wide residual networks*, BMVC 2016. For the variants from timm, see the functions that build
them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from fastres.errors import ArchitectureError, UnknownModelError, near_matches

_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".onnx", ".pt2")  # a name with this end is meant as a file


@dataclass(frozen=True)
class Architecture:
    """One network of the family.

    ``depths`` is the number of blocks in each stage. ``widths`` is the number of channels of each stage before the
    block's expansion. ``stem_widths`` is the number of channels of the stem's convolutions: one convolution, or three
    3×3 ones in a ``deep`` stem. ``shortcut`` is the branch that a block adds if the shapes differ: a 1×1
    ``projection`` (option B), an ``average_pool`` of 2×2 pixels before an unstrided projection (ResNet-D), a strided
    copy with zero channels (``pad``, option A), or nothing (``none``, a plain network). With ``squeeze_excitation``, a
    gate scales each channel of a block's output before the addition. A bottleneck has its stride in its 3×3
    convolution, or in its first 1×1 convolution if ``stride_in_1x1`` (as in the CVPR paper). ``first_stage_stride`` is
    1 in all published networks.
    """

    name: str
    block: Literal["basic", "bottleneck"]
    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    groups: int = 1
    width_per_group: int = 64
    stem: Literal["imagenet", "cifar", "deep"] = "imagenet"
    shortcut: Literal["projection", "average_pool", "pad", "none"] = "projection"
    num_classes: int = 1000
    stem_widths: tuple[int, ...] = (64,)
    stride_in_1x1: bool = False
    first_stage_stride: int = 1
    squeeze_excitation: bool = False

    @property
    def expansion(self) -> int:
        return 4 if self.block == "bottleneck" else 1

    @property
    def skip(self) -> bool:
        """True if blocks have a residual connection."""
        return self.shortcut != "none"

    @property
    def features(self) -> int:
        """Channels of the last stage, which are the inputs of the linear head."""
        return self.widths[-1] * self.expansion

    @property
    def minimum_size(self) -> int:
        """The smallest accepted image height and width, in pixels."""
        return 8 if self.stem == "cifar" else 32

    def with_classes(self, num_classes: int) -> Architecture:
        """Return the same network with another number of classes, or without a classifier for 0.

        Raises ``ArchitectureError`` unless ``num_classes`` is a whole number of at least 0.
        """
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
            raise ArchitectureError(
                f"num_classes is {num_classes!r}; give a whole number of at least 1, or 0 for no classifier"
            )
        return replace(self, num_classes=num_classes)


@dataclass(frozen=True)
class ConvSpec:
    """A convolution and the batch norm after it, with their names in the state dict."""

    conv: str
    norm: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """The weight's shape as PyTorch stores it: [K, C / groups, R, S]."""
        return (self.out_channels, self.in_channels // self.groups, self.kernel, self.kernel)


@dataclass(frozen=True)
class BlockSpec:
    """A block: its convolutions in order, and its shortcut if the shapes differ.

    ``squeezed`` is the width between the two layers of squeeze-and-excitation, or 0 without it. If ``pools``, the
    projection reads the average pool of the input.
    """

    name: str
    stage: int
    convs: tuple[ConvSpec, ...]
    projection: ConvSpec | None
    pools: bool
    pad: bool
    squeezed: int
    in_channels: int
    out_channels: int
    stride: int


def stem_specs(arch: Architecture) -> tuple[ConvSpec, ...]:
    """Return the stem's convolutions: 7×7 with stride 2 (ImageNet), 3×3 with stride 1 (CIFAR), or three 3×3 (deep)."""
    if arch.stem != "deep":
        kernel, stride = (7, 2) if arch.stem == "imagenet" else (3, 1)
        return (ConvSpec("conv1", "bn1", 3, arch.stem_widths[-1], kernel, stride),)
    names = (("conv1.0", "conv1.1"), ("conv1.3", "conv1.4"), ("conv1.6", "bn1"))
    channels = (3, *arch.stem_widths)
    return tuple(
        ConvSpec(conv, norm, channels[index], channels[index + 1], 3, 2 if index == 0 else 1)
        for index, (conv, norm) in enumerate(names)
    )


def block_specs(arch: Architecture) -> Iterator[BlockSpec]:
    """Yield the blocks of all stages, in the order in which they run."""
    channels = arch.stem_widths[-1]
    for stage, (depth, width) in enumerate(zip(arch.depths, arch.widths, strict=True), start=1):
        for index in range(depth):
            name = f"layer{stage}.{index}"
            stride = (2 if stage > 1 else arch.first_stage_stride) if index == 0 else 1
            out_channels = width * arch.expansion
            changes = stride != 1 or channels != out_channels
            projection = None
            if changes and arch.shortcut == "projection":
                projection = ConvSpec(f"{name}.downsample.0", f"{name}.downsample.1", channels, out_channels, 1, stride)
            elif changes and arch.shortcut == "average_pool":
                projection = ConvSpec(f"{name}.downsample.1", f"{name}.downsample.2", channels, out_channels, 1)
            yield BlockSpec(
                name,
                stage,
                _block_convs(arch, name, channels, width, stride),
                projection,
                stride != 1 and arch.shortcut == "average_pool",
                changes and arch.shortcut == "pad",
                squeezed_width(out_channels) if arch.squeeze_excitation else 0,
                channels,
                out_channels,
                stride,
            )
            channels = out_channels


def squeezed_width(channels: int) -> int:
    """Return the width between the layers of squeeze-and-excitation.

    It is a sixteenth of ``channels``, rounded to the nearest multiple of 8, as in timm.
    """
    return max(8, (channels // 16 + 4) // 8 * 8)


def _block_convs(arch: Architecture, name: str, channels: int, width: int, stride: int) -> tuple[ConvSpec, ...]:
    def conv(index: int, c: int, k: int, kernel: int, stride: int = 1, groups: int = 1) -> ConvSpec:
        return ConvSpec(f"{name}.conv{index}", f"{name}.bn{index}", c, k, kernel, stride, groups)

    if arch.block == "basic":
        return (conv(1, channels, width, 3, stride), conv(2, width, width, 3))
    inner = width * arch.width_per_group // 64 * arch.groups
    first, second = (stride, 1) if arch.stride_in_1x1 else (1, stride)
    return (
        conv(1, channels, inner, 1, first),
        conv(2, inner, inner, 3, second, arch.groups),
        conv(3, inner, width * arch.expansion, 1),
    )


def conv_specs(arch: Architecture) -> Iterator[ConvSpec]:
    """Yield every convolution that has parameters, stem first, in torchvision's state-dict order."""
    yield from stem_specs(arch)
    for block in block_specs(arch):
        yield from block.convs
        if block.projection is not None:
            yield block.projection


def gate_shapes(arch: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of the squeeze-and-excitation parameters: 1×1 convolutions, as timm stores them."""
    for block in block_specs(arch):
        if block.squeezed:
            k, s = block.out_channels, block.squeezed
            yield f"{block.name}.se.fc1.weight", (s, k, 1, 1)
            yield f"{block.name}.se.fc1.bias", (s,)
            yield f"{block.name}.se.fc2.weight", (k, s, 1, 1)
            yield f"{block.name}.se.fc2.bias", (k,)


NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


def state_dict_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every floating-point tensor in the network's state dict, in torchvision's order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in conv_specs(arch):
        shapes[f"{spec.conv}.weight"] = spec.weight_shape
        for part in NORM_PARTS:
            shapes[f"{spec.norm}.{part}"] = (spec.out_channels,)
    shapes.update(gate_shapes(arch))
    if arch.num_classes:
        shapes["fc.weight"] = (arch.num_classes, arch.features)
        shapes["fc.bias"] = (arch.num_classes,)
    return shapes


def _cifar(name: str, depth: int, shortcut: Literal["pad", "none"]) -> Architecture:
    blocks = (depth - 2) // 6
    return Architecture(
        name,
        "basic",
        (blocks,) * 3,
        (16, 32, 64),
        stem="cifar",
        shortcut=shortcut,
        num_classes=10,
        stem_widths=(16,),
    )


def _resnet_d(row: Architecture) -> Architecture:
    """Return ``row`` with a deep stem and average-pool shortcuts: He et al., *Bag of tricks*, CVPR 2019, §4.2."""
    name = row.name.replace("_", "d_", 1) if "_" in row.name else f"{row.name}d"
    return replace(row, name=name, stem="deep", stem_widths=(32, 32, 64), shortcut="average_pool")


def _squeeze_excite(row: Architecture) -> Architecture:
    """Return ``row`` with squeeze-and-excitation: Hu, Shen & Sun, CVPR 2018."""
    return replace(row, name=f"se{row.name}", squeeze_excitation=True)


_PLAIN_RESNETS = (
    Architecture("resnet18", "basic", (2, 2, 2, 2)),
    Architecture("resnet34", "basic", (3, 4, 6, 3)),
    Architecture("resnet26", "bottleneck", (2, 2, 2, 2)),
    Architecture("resnet50", "bottleneck", (3, 4, 6, 3)),
    Architecture("resnet101", "bottleneck", (3, 4, 23, 3)),
    Architecture("resnet152", "bottleneck", (3, 8, 36, 3)),
    Architecture("resnet200", "bottleneck", (3, 24, 36, 3)),
)

_ROWS = (
    *_PLAIN_RESNETS,
    Architecture("resnext50_32x4d", "bottleneck", (3, 4, 6, 3), groups=32, width_per_group=4),
    Architecture("resnext101_32x4d", "bottleneck", (3, 4, 23, 3), groups=32, width_per_group=4),
    Architecture("resnext101_32x8d", "bottleneck", (3, 4, 23, 3), groups=32, width_per_group=8),
    Architecture("resnext101_32x16d", "bottleneck", (3, 4, 23, 3), groups=32, width_per_group=16),
    Architecture("resnext101_32x32d", "bottleneck", (3, 4, 23, 3), groups=32, width_per_group=32),
    Architecture("resnext101_64x4d", "bottleneck", (3, 4, 23, 3), groups=64, width_per_group=4),
    Architecture("wide_resnet50_2", "bottleneck", (3, 4, 6, 3), width_per_group=128),
    Architecture("wide_resnet101_2", "bottleneck", (3, 4, 23, 3), width_per_group=128),
    *(_resnet_d(row) for row in _PLAIN_RESNETS),
    *(_squeeze_excite(row) for row in _PLAIN_RESNETS if row.name in ("resnet50", "resnet101", "resnet152")),
    _squeeze_excite(Architecture("resnext50_32x4d", "bottleneck", (3, 4, 6, 3), groups=32, width_per_group=4)),
    _squeeze_excite(_resnet_d(Architecture("resnet152", "bottleneck", (3, 8, 36, 3)))),
    Architecture("plain18", "basic", (2, 2, 2, 2), shortcut="none"),
    Architecture("plain34", "basic", (3, 4, 6, 3), shortcut="none"),
    *(_cifar(f"resnet{depth}", depth, "pad") for depth in (20, 32, 44, 56, 110)),
    *(_cifar(f"plain{depth}", depth, "none") for depth in (20, 32, 44, 56, 110)),
    replace(_cifar("resnet20", 20, "pad"), name="resnet20_digits"),
)

ARCHITECTURES: dict[str, Architecture] = {row.name: row for row in _ROWS}


def get_architecture(name: str) -> Architecture:
    """Return the architecture called ``name``. Raise ``UnknownModelError``, with similar names, if there is none."""
    if not isinstance(name, str):
        raise UnknownModelError(
            f"A model's name must be a string, not {type(name).__name__}. fastres.list_models() lists all."
        )
    if name not in ARCHITECTURES:
        hint = near_matches(name.lower().replace("-", "_"), ARCHITECTURES)
        file = ""
        if "/" in name or name.endswith(_FILES):
            there = os.path.exists(name)
            file = ", and this is no file that model.save wrote" if there else ", and there is no such file"
        plain = name.partition(".")[0]
        if plain in ARCHITECTURES and not file:
            hint = f" Did you mean timm's weights? Their hub id is 'timm/{name}'."
        raise UnknownModelError(f"No model is called {name!r}{file}.{hint} fastres.list_models() lists all.")
    return ARCHITECTURES[name]
