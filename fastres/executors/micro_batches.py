"""Micro-batches by rule: the first stages a few images at a time, on GPUs whose L2 cache is large and memory slow.

The activations of so many images then stay in the cache from one kernel to the next. That costs more launches, and
kernels that fill the GPU less well; it pays where the memory is slow enough, and never on an A100, H100 or H200. Where
the GPU's own table has a network, that decides.
"""

from __future__ import annotations

import functools

import torch

from fastres.kernels.launch import cdiv
from fastres.kernels.routing.cards import INTERPRETER, Gpu
from fastres.kernels.routing.tables import Network
from fastres.network.architectures import Architecture
from fastres.network.folding import outline
from fastres.network.plan import Plan, Shape
from fastres.roofline.estimate import L2_SHARE, attainable, network_seconds
from fastres.text import dtype_name

from .arena import plan_arena

# What the L2 cache holds must take the memory so long to deliver: an L4, L40S, RTX 4090 and RTX 5090 take 168, 117, 75
# and 56 µs, an A100, H100 and H200 27, 16 and 13.
LEAST_SECONDS = 40e-6

# An estimate that is better by less than this decides nothing.
LEAST_GAIN = 1.05


@functools.lru_cache(maxsize=256)
def micro_batches(
    architecture: Architecture, shape: Shape, dtype: torch.dtype, gpu: Gpu, precision: str = "ieee"
) -> Network | None:
    """How to run a batch of ``shape`` (NHWC) in micro-batches; None where that is not estimated to pay."""
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
    """How many images' activations up to ``through`` fit the L2 cache, in equal parts of the batch; 0 where none do."""
    n, h, w, _ = shape
    if through not in plan.features:
        return 0
    arena = plan_arena(plan.steps_for((plan.features[through],)), plan.shapes(1, h, w))
    fitting = int(L2_SHARE * gpu.l2_cache / (arena.size * dtype.itemsize))
    return cdiv(n, cdiv(n, fitting)) if fitting else 0
