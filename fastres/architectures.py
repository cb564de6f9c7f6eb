"""The ResNet family as data: one frozen dataclass, one table.

A network is a stem, stages of residual blocks and a linear head. What differs between ResNet-18, ResNeXt-101,
a plain (shortcut-free) network and the CIFAR networks is a row of this table; nothing elsewhere asks for a
model by name. Parameter names are torchvision's (``conv1``, ``layer1.0.bn2``, ``layer2.0.downsample.0``, ``fc``).

Sources: He et al., *Deep residual learning for image recognition*, CVPR 2016 (the family, the plain networks,
the CIFAR networks with option-A shortcuts, §4.2); Xie et al., *Aggregated residual transformations*, CVPR 2017
(ResNeXt); Zagoruyko & Komodakis, *Wide residual networks*, BMVC 2016. Bottlenecks put the stride in their
3×3 convolution, as torchvision does ("ResNet v1.5").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from .errors import ArchitectureError, UnknownModelError, near_matches


@dataclass(frozen=True)
class Architecture:
    """One network of the family.

    ``depths`` is the number of blocks in each stage, ``widths`` the channels of each stage before the block's
    expansion, and ``stem_widths`` the channels of the stem's convolutions. ``shortcut`` says what a block adds to its
    output where shapes differ: a 1×1 ``projection`` (option B), a strided copy with zero channels (``pad``, option A),
    or nothing at all (``none``, a plain network). A bottleneck has its stride in its 3×3 convolution, or in its first
    1×1 one where ``stride_in_1x1`` (as in the CVPR paper). ``first_stage_stride`` is 1 in all published networks.
    """

    name: str
    block: Literal["basic", "bottleneck"]
    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    groups: int = 1
    width_per_group: int = 64
    stem: Literal["imagenet", "cifar"] = "imagenet"
    shortcut: Literal["projection", "pad", "none"] = "projection"
    num_classes: int = 1000
    stem_widths: tuple[int, ...] = (64,)
    stride_in_1x1: bool = False
    first_stage_stride: int = 1

    @property
    def expansion(self) -> int:
        return 4 if self.block == "bottleneck" else 1

    @property
    def skip(self) -> bool:
        """Whether blocks have a residual connection at all."""
        return self.shortcut != "none"

    @property
    def features(self) -> int:
        """Channels of the last stage: the input of the linear head."""
        return self.widths[-1] * self.expansion

    @property
    def minimum_size(self) -> int:
        """Smallest accepted image height and width, in pixels."""
        return 32 if self.stem == "imagenet" else 8

    def with_classes(self, num_classes: int) -> Architecture:
        """The same network with another number of classes, 0 for no classifier; raises ``ArchitectureError`` below."""
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
            raise ArchitectureError(
                f"num_classes is {num_classes!r}; give a whole number of at least 1, or 0 for no classifier"
            )
        return replace(self, num_classes=num_classes)


@dataclass(frozen=True)
class ConvSpec:
    """A convolution and the batch norm that follows it, by their names in the state dict."""

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
        """[K, C / groups, R, S], as PyTorch stores it."""
        return (self.out_channels, self.in_channels // self.groups, self.kernel, self.kernel)


@dataclass(frozen=True)
class BlockSpec:
    """A block: its convolutions in order, and what stands on its shortcut where shapes differ."""

    name: str
    stage: int
    convs: tuple[ConvSpec, ...]
    projection: ConvSpec | None
    pad: bool
    in_channels: int
    out_channels: int
    stride: int


def stem_spec(arch: Architecture) -> ConvSpec:
    """The first convolution: 7×7 with stride 2 (ImageNet) or 3×3 with stride 1 (CIFAR)."""
    kernel, stride = (7, 2) if arch.stem == "imagenet" else (3, 1)
    return ConvSpec("conv1", "bn1", 3, arch.stem_widths[-1], kernel, stride)


def block_specs(arch: Architecture) -> Iterator[BlockSpec]:
    """Yield the blocks of all stages, in the order in which they run."""
    channels = stem_spec(arch).out_channels
    for stage, (depth, width) in enumerate(zip(arch.depths, arch.widths, strict=True), start=1):
        for index in range(depth):
            name = f"layer{stage}.{index}"
            stride = (2 if stage > 1 else arch.first_stage_stride) if index == 0 else 1
            out_channels = width * arch.expansion
            changes = stride != 1 or channels != out_channels
            projection = None
            if changes and arch.shortcut == "projection":
                projection = ConvSpec(f"{name}.downsample.0", f"{name}.downsample.1", channels, out_channels, 1, stride)
            yield BlockSpec(
                name,
                stage,
                _block_convs(arch, name, channels, width, stride),
                projection,
                changes and arch.shortcut == "pad",
                channels,
                out_channels,
                stride,
            )
            channels = out_channels


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
    yield stem_spec(arch)
    for block in block_specs(arch):
        yield from block.convs
        if block.projection is not None:
            yield block.projection


NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


def state_dict_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every floating-point tensor in the network's state dict, in torchvision's order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in conv_specs(arch):
        shapes[f"{spec.conv}.weight"] = spec.weight_shape
        for part in NORM_PARTS:
            shapes[f"{spec.norm}.{part}"] = (spec.out_channels,)
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


_ROWS = (
    Architecture("resnet18", "basic", (2, 2, 2, 2)),
    Architecture("resnet34", "basic", (3, 4, 6, 3)),
    Architecture("resnet26", "bottleneck", (2, 2, 2, 2)),
    Architecture("resnet50", "bottleneck", (3, 4, 6, 3)),
    Architecture("resnet101", "bottleneck", (3, 4, 23, 3)),
    Architecture("resnet152", "bottleneck", (3, 8, 36, 3)),
    Architecture("resnet200", "bottleneck", (3, 24, 36, 3)),
    Architecture("resnext50_32x4d", "bottleneck", (3, 4, 6, 3), groups=32, width_per_group=4),
    Architecture("resnext101_32x4d", "bottleneck", (3, 4, 23, 3), groups=32, width_per_group=4),
    Architecture("resnext101_32x8d", "bottleneck", (3, 4, 23, 3), groups=32, width_per_group=8),
    Architecture("resnext101_32x16d", "bottleneck", (3, 4, 23, 3), groups=32, width_per_group=16),
    Architecture("resnext101_32x32d", "bottleneck", (3, 4, 23, 3), groups=32, width_per_group=32),
    Architecture("resnext101_64x4d", "bottleneck", (3, 4, 23, 3), groups=64, width_per_group=4),
    Architecture("wide_resnet50_2", "bottleneck", (3, 4, 6, 3), width_per_group=128),
    Architecture("wide_resnet101_2", "bottleneck", (3, 4, 23, 3), width_per_group=128),
    Architecture("plain18", "basic", (2, 2, 2, 2), shortcut="none"),
    Architecture("plain34", "basic", (3, 4, 6, 3), shortcut="none"),
    *(_cifar(f"resnet{depth}", depth, "pad") for depth in (20, 32, 44, 56, 110)),
    *(_cifar(f"plain{depth}", depth, "none") for depth in (20, 32, 44, 56, 110)),
    replace(_cifar("resnet20", 20, "pad"), name="resnet20_digits"),
)

ARCHITECTURES: dict[str, Architecture] = {row.name: row for row in _ROWS}


def list_models() -> list[str]:
    """Names that :func:`fastres.load` accepts."""
    return list(ARCHITECTURES)


def get_architecture(name: str) -> Architecture:
    """Return the row called ``name``; raises ``UnknownModelError`` with near matches."""
    if not isinstance(name, str):
        raise UnknownModelError(
            f"A model is named by a string, not {type(name).__name__}. fastres.list_models() lists all."
        )
    if name not in ARCHITECTURES:
        hint = near_matches(name.lower().replace("-", "_"), ARCHITECTURES)
        raise UnknownModelError(f"No model is called {name!r}.{hint} fastres.list_models() lists all.")
    return ARCHITECTURES[name]
