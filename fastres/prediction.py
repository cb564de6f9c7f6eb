"""How long a GPU takes for one step: what tuning measured, or else what the chosen tiles let one expect.

A prediction counts whole waves of programs, the tiles' traffic through L2 and the unavoidable traffic to memory. It
knows nothing of latency, of pipelining or of what a launch costs: it is what a flawless kernel would take.
"""

from __future__ import annotations

import math

import torch

from .ceilings import Ceilings
from .gpu import block_of, conv_shape
from .kernels import conv_specialized, conv_tma, dispatch, routing
from .kernels.cards import Gpu
from .kernels.launch import cdiv, float32_precision
from .kernels.routing import ConvConfig, ConvShape, stem_programs
from .kernels.tables import Layer
from .plan import Conv, Head, Joined, Pool, Shape, SqueezeExcite, Stem, Step, StepCost

# Bytes a second between L2 and the multiprocessors, in multiples of the copy rate of device memory.
L2_TO_MEMORY = 1.5


def conv_seconds(layer: Layer, config: ConvConfig, gpu: Gpu, limits: Ceilings) -> float:
    """A prediction from whole waves of tiles, tile traffic through L2 and compulsory memory traffic."""
    shape, size = layer.shape, getattr(torch, layer.dtype).itemsize
    rows = cdiv(shape.M, config.block_m)
    if config.kernel in conv_tma.KERNELS:  # a tile is one pixel of BLOCK_M images
        rows = cdiv(shape.N, config.block_m) * shape.P * shape.Q
    elif config.kernel in conv_specialized.KERNELS:
        rows = conv_specialized.pixel_tiles(shape, conv_specialized.box_of(shape, config.block_m, config.kernel))
    tiles = rows * cdiv(shape.K, config.block_n) * shape.groups
    reduction = shape.R * shape.S * cdiv(shape.C, config.block_k) * config.block_k
    waves = cdiv(tiles * config.split, gpu.multiprocessors)
    flops = 2 * config.block_m * config.block_n * cdiv(reduction, config.split * config.block_k) * config.block_k
    compute = waves * flops / (limits.tflops * 1e12 / gpu.multiprocessors)
    through_l2 = tiles * (config.block_m + config.block_n) * reduction * size
    if config.split > 1:  # partial sums are written and read once, in float32
        through_l2 += 2 * 4 * tiles * config.split * config.block_m * config.block_n
    moved = shape.N * shape.H * shape.W * shape.C * shape.groups
    moved += shape.M * shape.K * shape.groups * (2 if layer.residual else 1)
    memory = moved * size / (limits.gb_per_s * 1e9)
    return max(compute, through_l2 / (L2_TO_MEMORY * limits.gb_per_s * 1e9), memory)


def step_estimate(
    step: Step, cost: StepCost, dtype: torch.dtype, gpu: Gpu, limits: Ceilings
) -> tuple[float | None, str]:
    """Seconds of ``step`` and whether they are ``"measured"`` (by the tuner, on this GPU) or ``"predicted"``.

    ``(None, "")`` for a kind of step that neither is known of.
    """
    shape = cost.input_shape
    if isinstance(step, Conv):
        return _conv_estimate(step, shape, dtype, gpu, limits)
    if isinstance(step, Joined):
        return _joined_estimate(step, cost, dtype, gpu, limits)
    if isinstance(step, (Pool, SqueezeExcite)):
        again = math.prod(shape) * dtype.itemsize if isinstance(step, SqueezeExcite) else 0  # read for the mean first
        return (cost.bytes + again) / (limits.gb_per_s * 1e9), "predicted"
    if isinstance(step, Stem):
        return _stem_seconds(step, cost, dtype, gpu, limits), "predicted"
    if isinstance(step, Head):
        return _head_seconds(step, shape, dtype, gpu, limits), "predicted"
    return None, ""


def _conv_estimate(step: Conv, shape: Shape, dtype: torch.dtype, gpu: Gpu, limits: Ceilings) -> tuple[float, str]:
    residual = step.residual is not None
    layer = Layer.of(conv_shape(step, shape), dtype, residual)
    precision = float32_precision()
    config = dispatch.route(layer.shape, dtype, gpu, residual=residual, precision=precision)
    for entry in dispatch.tuned(gpu).entries(layer):
        if entry.layer == layer and entry.config == config:
            return entry.microseconds / 1e6, "measured"
    return conv_seconds(layer, config, gpu, limits), "predicted"


def _joined_estimate(step: Joined, cost: StepCost, dtype: torch.dtype, gpu: Gpu, limits: Ceilings) -> tuple[float, str]:
    """As measured for just this run; by proportion to the nearest batch measured, that is a prediction."""
    block = block_of(step, cost.input_shape, dtype)
    found = dispatch.route_block(block, dtype, gpu)
    if found is None:
        return max(cost.flops / (limits.tflops * 1e12), cost.bytes / (limits.gb_per_s * 1e9)), "predicted"
    seconds = found.microseconds / 1e6 * block.shape.N / found.layer.shape.N
    return seconds, "measured" if found.layer == block else "predicted"


def _stem_seconds(step: Stem, cost: StepCost, dtype: torch.dtype, gpu: Gpu, limits: Ceilings) -> float:
    pixels = step.conv_shape(cost.input_shape)[:3]
    config = routing.route_stem(step.weight.shape[0], pixels, dtype, gpu, step.pool)
    n, p, q, _ = cost.output_shape
    if step.pool:  # the last of 2·rows + 1 convolution rows is the next program's first
        programs, again = stem_programs(n, p, q, config.block_q, config.rows), 1 + 1 / (2 * config.rows)
    else:
        programs, again = n * cdiv(p, config.rows) * cdiv(q, config.block_q), 1.0
    compute, memory = cost.flops * again / (limits.tflops * 1e12), cost.bytes / (limits.gb_per_s * 1e9)
    seconds = max(compute, memory) * _idle(programs, gpu)
    if config.prepared:  # four channels a pixel are written before and read again
        n, h, w, _ = cost.input_shape
        seconds += 2 * 4 * n * h * w * dtype.itemsize / (limits.gb_per_s * 1e9)
    return seconds


def _head_seconds(step: Head, shape: Shape, dtype: torch.dtype, gpu: Gpu, limits: Ceilings) -> float:
    """The pool reads its input once; then the classifier, which is a convolution over one pixel."""
    n, h, w, c = shape
    pool = routing.route_pool(c, h * w)
    pooling = n * h * w * c * dtype.itemsize / (limits.gb_per_s * 1e9) * _idle(n * cdiv(c, pool.block_c), gpu)
    linear = ConvShape(n, 1, 1, c, step.weight.shape[0], 1, 1, 1, 0)
    config = routing.route_conv(linear, dtype, gpu, float32_precision())
    return pooling + conv_seconds(Layer.of(linear, dtype, False), config, gpu, limits)


def _idle(programs: int, gpu: Gpu) -> float:
    """How much longer whole waves of ``programs`` take than if no multiprocessor were ever idle."""
    return cdiv(programs, gpu.multiprocessors) * gpu.multiprocessors / programs
