"""Shared by all tests: makes torchvision importable next to a CPU build of torch."""

from __future__ import annotations

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _define_torchvision_ops() -> torch.library.Library | None:
    """Declare the compiled ops that torchvision's import looks up; wheels for CPU builds of torch lack them."""
    if torch.cuda.is_available():
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}{_SIGNATURE}")
    return library


_library = _define_torchvision_ops()  # lives as long as the process: its end would undo the definitions
