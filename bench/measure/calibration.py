"""Random networks whose logits depend on the image, for tests and benchmarks that need no download.

The logits of a freshly initialised ResNet hardly depend on its input: they differ between images by a few per cent of
their norm. So a wrong input layout stays within a low-precision tolerance, and a zero-initialised last batch-norm scale
hides a whole residual branch. Calibration draws every scale and offset at random and sets the running statistics with
training-mode passes over smooth random pictures. The logits of different images then differ by about 30 %.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres.bench.engines.eager import Block, EagerResNet
from fastres.network.architectures import Architecture

# Residual branches at full scale make deep networks chaotic: ResNet-152 then amplifies float32 rounding 500-fold. At
# half scale, networks deeper than a ResNet-50 still turn bfloat16's rounding into errors as large as the differences
# between images. Their branches are smaller by as much as they have more of them.
RESIDUAL_SCALE, BLOCKS = 0.5, 16


def smooth_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return smooth random pictures, float32 ``[count, 3, height, width]``, with about zero mean and unit variance.

    Each is a sum of noise at four scales, like the spectrum of photographs, with its own colour and contrast.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 3, height, width)
    for cells, weight in ((2, 1.0), (5, 0.7), (11, 0.5), (29, 0.3)):
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        images += weight * nn.functional.interpolate(noise, (height, width), mode="bicubic", align_corners=False)
    contrast = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    colour = 0.5 * torch.randn(count, 3, 1, 1, generator=generator)
    return images * contrast + colour


def pixels(images: Tensor) -> Tensor:
    """Convert pictures of :func:`smooth_images` to uint8 RGB pixels, ``[N, 3, H, W]``."""
    return (images * 55 + 120).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def randomise_(module: nn.Module, seed: int = 0) -> None:
    """Draw every parameter at random, in place.

    Batch-norm scales are uniform in [0.5, 1.5], or half that at the end of a residual branch: less in networks with
    more than ``BLOCKS`` blocks. Offsets and weights are normal with mean zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.copy_(0.5 + torch.rand(layer.weight.shape, generator=generator))
            layer.bias.copy_(0.2 * torch.randn(layer.bias.shape, generator=generator))
        elif isinstance(layer, nn.Conv2d):
            fan = layer.weight[0].numel()
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (2 / fan) ** 0.5)
            if layer.bias is not None:  # only in squeeze-and-excitation
                layer.bias.copy_(0.5 * torch.randn(layer.bias.shape, generator=generator))
        elif isinstance(layer, nn.Linear):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
            layer.bias.copy_(0.1 * torch.randn(layer.bias.shape, generator=generator))
    residual = [layer for layer in module.modules() if isinstance(layer, Block) and layer.skip]
    for block in residual:
        getattr(block, f"bn{block.depth}").weight.mul_(RESIDUAL_SCALE * min(1, BLOCKS / len(residual)))


@torch.no_grad()
def calibrate_(module: nn.Module, size: int = 64, count: int = 16, seed: int = 0) -> nn.Module:
    """Randomise ``module``, set its batch-norm statistics from smooth pictures, and return it in eval mode."""
    randomise_(module, seed)
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average over the passes
    module.train()
    logits = module(smooth_images(count, size, size, seed + 1))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    # Subtract half of the mean logits, so that the differences between images have more weight.
    classifier = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    classifier.bias.sub_(0.5 * logits.mean(0))
    return module.eval()


def calibrated(arch: Architecture, seed: int = 0) -> EagerResNet:
    """Return a calibrated float32 network of ``arch`` in eval mode. The same seed gives the same network."""
    size = 32 if arch.stem == "cifar" else 64
    with torch.device("meta"):  # avoids the module's own initialisation, which would be overwritten
        module = EagerResNet(arch)
    calibrate_(module.to_empty(device="cpu"), size=size, seed=seed)
    return module


def spread(logits: Tensor) -> float:
    """Return the mean relative L2 distance between each image's logits and the batch's mean logits."""
    logits = logits.double()
    centre = logits.mean(0, keepdim=True)
    return float(((logits - centre).norm(dim=1) / logits.norm(dim=1)).mean())
