"""Shared by the tests of other libraries' checkpoints: calibrated live modules, and fastres's models next to them."""

from __future__ import annotations

from torch import Tensor, nn

import fastres
from fastres.bench.measure.calibration import calibrate_, smooth_images
from tests.measures import Yardstick

# Two odd sizes: every window and stride ends differently on each side.
SIZES = ((64, 64), (75, 97))


class Logits(nn.Module):
    """A transformers model as a function from images to logits."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x).logits


def calibrated_live(module: nn.Module, seed: int = 0) -> nn.Module:
    """``module`` with random weights whose logits depend on the image, in eval mode."""
    calibrate_(module, count=8, seed=seed)
    return module


def check_logits(module: nn.Module, model: fastres.Model, sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
    """Fails where ``model`` is further from ``module`` in float64 than float32 allows."""
    images = (smooth_images(batch, h, w, seed=h) for batch, (h, w) in zip((3, 2), sizes, strict=False))
    Yardstick(module, *images, least_spread=0.15).check(model)
