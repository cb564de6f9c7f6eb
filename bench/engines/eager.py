"""The plain PyTorch module of an architecture, as you would write it without fastres.

It is the eager engine of the benchmark, the float64 reference of the tests and the module that training uses. Its state
dict has torchvision's names. For the ten torchvision models its results match ``torchvision.models`` (tested).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres.network.architectures import Architecture, BlockSpec, ConvSpec, block_specs, stem_specs


def _conv(spec: ConvSpec) -> nn.Conv2d:
    return nn.Conv2d(
        spec.in_channels, spec.out_channels, spec.kernel, spec.stride, spec.padding, groups=spec.groups, bias=False
    )


class PadShortcut(nn.Module):
    """Option A of He et al.: take every ``stride``-th pixel and pad the channels with zeros on both sides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, self.before, self.after))


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: scale each channel by a gate computed from all channel means. Names are timm's."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Block(nn.Module):
    """Two or three convolutions with batch norm and ReLU, and a shortcut around them."""

    def __init__(self, spec: BlockSpec, skip: bool) -> None:
        super().__init__()
        self.depth = len(spec.convs)
        self.skip = skip
        for index, conv in enumerate(spec.convs, start=1):
            setattr(self, f"conv{index}", _conv(conv))
            setattr(self, f"bn{index}", nn.BatchNorm2d(conv.out_channels))
        self.relu = nn.ReLU(inplace=True)
        self.se = SqueezeExcite(spec.out_channels, spec.squeezed) if spec.squeezed else None
        self.downsample: nn.Module | None = None
        if spec.projection is not None:
            layers = [_conv(spec.projection), nn.BatchNorm2d(spec.out_channels)]
            if spec.projection.conv.endswith(".1"):
                pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
                layers.insert(0, pool if spec.pools else nn.Identity())
            self.downsample = nn.Sequential(*layers)
        elif spec.pad:
            self.downsample = PadShortcut(spec.in_channels, spec.out_channels, spec.stride)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index in range(1, self.depth + 1):
            y = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(y))
            if index < self.depth:
                y = self.relu(y)
        if self.se is not None:
            y = self.se(y)
        if self.skip:
            y = y + (x if self.downsample is None else self.downsample(x))
        return self.relu(y)


class EagerResNet(nn.Module):
    """A ResNet in plain PyTorch.

    ``forward`` maps normalised images ``[N, 3, H, W]`` to logits ``[N, num_classes]``, or to pooled features if there
    is no classifier.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.architecture = arch
        *others, last = stem_specs(arch)
        layers = [layer for spec in others for layer in (_conv(spec), nn.BatchNorm2d(spec.out_channels), nn.ReLU())]
        self.conv1 = nn.Sequential(*layers, _conv(last)) if others else _conv(last)
        self.bn1 = nn.BatchNorm2d(last.out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if arch.stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        self.stages = [f"layer{stage}" for stage in range(1, len(arch.depths) + 1)]
        blocks: dict[str, list[nn.Module]] = {name: [] for name in self.stages}
        for spec in block_specs(arch):
            blocks[f"layer{spec.stage}"].append(Block(spec, arch.skip))
        for name, members in blocks.items():
            setattr(self, name, nn.Sequential(*members))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(arch.features, arch.num_classes) if arch.num_classes else nn.Identity()
        for module in self.modules():
            # Meta tensors have no values to initialise, and the call would import torch's compiler.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))
