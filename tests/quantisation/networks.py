"""Small float plans and pictures for the tests of calibration."""

from __future__ import annotations

import functools
from dataclasses import replace

from torch import Tensor

from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from fastres.folding.build import build_plan
from fastres.network.architectures import get_architecture
from fastres.network.plan import Plan
from tests.subjects import EVERY_STEP

GROUPED = replace(get_architecture("resnext50_32x4d"), depths=(1, 1), widths=(16, 32), groups=4, width_per_group=16)
BASIC = replace(get_architecture("resnet18"), depths=(1, 1), widths=(16, 32), num_classes=10)
NETWORKS = {"every step": EVERY_STEP, "grouped": GROUPED, "basic": BASIC}


@functools.lru_cache(maxsize=4)
def float_plan(name: str) -> Plan:
    network = calibrated(NETWORKS[name])
    return build_plan(network.state_dict(), network.architecture)


def pictures(count: int, seed: int = 1, size: int = 40) -> Tensor:
    return pixels(smooth_images(count, size, size, seed=seed))
