"""Shared by the tests of other libraries' checkpoints: calibrated modules, and their comparison with fastres."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastres
from fastres.bench.measure.calibration import calibrate_, smooth_images
from tests.measures import Yardstick

# Two odd sizes, so that every window and stride ends differently in height and width.
SIZES = ((64, 64), (75, 97))
# A small network of transformers'.
SMALL: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [32, 64, 96], "depths": [1, 2, 1], "num_labels": 5}


class Logits(nn.Module):
    """Wraps a transformers model as a function from images to logits."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x).logits


def calibrated_live(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return ``module`` in eval mode, with random weights for which the logits depend on the image."""
    calibrate_(module, count=8, seed=seed)
    return module


def live_transformers(**config: Any) -> Logits:
    """Return transformers' ResNet of this configuration, calibrated."""
    import transformers

    torch.manual_seed(0)
    module = transformers.ResNetForImageClassification(transformers.ResNetConfig(**config))
    return calibrated_live(Logits(module))  # type: ignore[return-value]


def check_logits(module: nn.Module, model: fastres.Model, sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
    """Fail if ``model`` is further from ``module`` in float64 than float32 allows."""
    images = (smooth_images(batch, h, w, seed=h) for batch, (h, w) in zip((3, 2), sizes, strict=False))
    Yardstick(module, *images, least_spread=0.15).check(model)
