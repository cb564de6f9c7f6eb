"""The mean and standard deviation of ImageNet's RGB channels, for pixels scaled to [0, 1], as torchvision uses them."""

from __future__ import annotations

Triple = tuple[float, float, float]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
