"""Micro-batches by rule: run the first stages a few images at a time on GPUs with a large L2 cache and slow memory.

The activations of a micro-batch stay in the cache from one kernel to the next. The price is more launches, and kernels
that fill the GPU less well. It pays if the memory is slow enough, and never on an A100, H100 or H200. If the GPU's own
table has an entry for a network, that entry decides.
"""

from __future__ import annotations

import functools

import torch

from fastres.folding.build import outline
from fastres.kernels.launch import cdiv
from fastres.kernels.routing.cards import INTERPRETER, Gpu
from fastres.kernels.routing.tables import Network
from fastres.network.architectures import Architecture
from fastres.network.plan import Plan, Shape
from fastres.roofline.estimate import L2_SHARE, attainable, network_seconds
from fastres.text import dtype_name

from .arena import plan_arena

# The memory must take at least this long to deliver one L2 cache's worth of data. An L4, L40S, RTX 4090 and RTX 5090
# take 168, 117, 75 and 56 µs, an A100, H100 and H200 27, 16 and 13.
LEAST_SECONDS = 40e-6

# Micro-batches are used only if their estimate is better by at least this factor.
LEAST_GAIN = 1.05


@functools.lru_cache(maxsize=256)
def micro_batches(
    architecture: Architecture, shape: Shape, dtype: torch.dtype, gpu: Gpu, precision: str = "ieee"
) -> Network | None:
    """Return how to run a batch of ``shape`` (NHWC) in micro-batches, or None if the estimate shows no gain."""
    if gpu is INTERPRETER or not gpu.gb_per_s or gpu.l2_cache / (gpu.gb_per_s * 1e9) < LEAST_SECONDS:
        return None
    limits = attainable(gpu, dtype, precision)
    if limits is None:
        return None
    plan = outline(architecture, dtype)
    n, h, w, _ = shape
    whole = Network(architecture.name, n, h, w, dtype_name(dtype))
    ways = {whole: network_seconds(plan, shape, dtype, gpu, limits)}
    for through in ("layer1", "layer2"):
        images = images_in_cache(plan, through, shape, dtype, gpu)
        if 0 < images < n:
            way = Network(architecture.name, n, h, w, dtype_name(dtype), through=through, images=images)
            ways[way] = network_seconds(plan, shape, dtype, gpu, limits, way)
    best = min(ways, key=lambda way: ways[way])
    return best if ways[whole] > LEAST_GAIN * ways[best] else None


def images_in_cache(plan: Plan, through: str, shape: Shape, dtype: torch.dtype, gpu: Gpu) -> int:
    """Return how many images' activations up to ``through`` fit in the L2 cache, in equal parts of the batch.

    Return 0 if not even one image fits.
    """
    n, h, w, _ = shape
    if through not in plan.features:
        return 0
    arena = plan_arena(plan.steps_for((plan.features[through],)), plan.shapes(1, h, w))
    fitting = int(L2_SHARE * gpu.l2_cache / (arena.size * dtype.itemsize))
    return cdiv(n, cdiv(n, fitting)) if fitting else 0
