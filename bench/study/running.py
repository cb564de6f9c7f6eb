"""Run the networks of a study with fastres, and compare them with the PyTorch modules that were studied."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import fastres
from fastres.errors import FastresError

from .training import EVALUATION_BATCH, error_of, logits, module_of

COMPARED = 60  # images that also go through the float64 network
# The largest accepted distance of fastres from float64, in multiples of PyTorch's distance in float32. The two sum in
# different orders. The largest ratio over the networks studied here was 1.2.
FACTOR, FLOOR = 5.0, 1e-6


@torch.inference_mode()
def run(model: str, state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Compute logits ``[N, 10]`` of normalised ``images`` with fastres, in float32 on the CPU."""
    network = fastres.load(model, dict(state), dtype="float32", progress=False)
    return torch.cat([network(part) for part in images.split(EVALUATION_BATCH)])


def compare(label: str, model: str, state: dict[str, Tensor], images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Run ``state`` with fastres and with PyTorch. Return both errors on all images, and both distances on some.

    A distance is ‖logits − float64 logits‖ / ‖float64 logits‖. Raise ``FastresError`` if the distance of fastres is
    much larger than that of PyTorch.
    """
    module = module_of(model, state)
    ours, theirs = run(model, state, images), logits(module, images)
    exact = logits(copy.deepcopy(module).double(), images[:COMPARED].double())
    off, eager_off = (float((found[:COMPARED] - exact).norm() / exact.norm()) for found in (ours, theirs))
    if not off <= FACTOR * eager_off + FLOOR:
        raise FastresError(
            f"{label}: the logits of fastres differ from float64 by {off:.1e}, but those of PyTorch only by "
            f"{eager_off:.1e}; please report this"
        )
    return {
        "network": label,
        "images": len(images),
        "fastres_error": error_of(ours, labels),
        "pytorch_error": error_of(theirs, labels),
        "fastres_distance": off,
        "pytorch_distance": eager_off,
    }
