"""The time of one step, or of a network, on a GPU: measured by the tuner, or estimated from the tiles.

The estimate of a step is the longest of four times: the arithmetic of whole waves of programs; the tiles' traffic
through L2; the unavoidable traffic to memory, without activations that the L2 cache still holds; and the chain of a
program's reduction steps, each of which waits for its loads. A network adds the gap between dependent kernels. The
rates below are assumed, not fitted to data. **They were not measured on the GPUs that they describe.** In all other
respects the kernels are assumed to be perfect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from fastres.kernels import conv_specialized, conv_tma, dispatch
from fastres.kernels.launch import cdiv, float32_precision
from fastres.kernels.routing import rules
from fastres.kernels.routing.cards import Gpu
from fastres.kernels.routing.rules import ConvConfig, stem_programs
from fastres.kernels.routing.tables import Layer, Network
from fastres.kernels.tma import persistent
from fastres.network.plan import Conv, Head, Joined, Plan, Pool, Shape, SqueezeExcite, Stem, Step, StepCost, step_cost

from .ceilings import Ceilings, stated
from .gpu_shapes import block_of, conv_shape, linear_shape

# The rate at which L2 delivers to a multiprocessor, bytes/s: 32 to 45 bytes/ns are reported for a T4, A100 and H100.
L2_RATE = 40e9

# Time from a load to the use of its data. About twice the 0.27 µs reported for the memory of an idle H100, to allow for
# the addresses, masks and barriers around the load.
LOAD = 0.5e-6

# Time from the last program of a kernel to the first of the next, in a CUDA graph.
GAP = 1.0e-6

# Time of a step of the stem in strips (kernels/stem_strip.py), two programs to a multiprocessor, on an H100.
STRIP_STEP = 2.6e-6

# The part of the L2 cache that holds a step's activations until the next step reads them.
L2_SHARE = 0.6

# The share of its data sheet's rates that an H200 reached: 790 of 989 TFLOP/s of a matrix product, 4300 of 4800 GB/s of
# a copy.
OF_MATRIX_RATE, OF_MEMORY_RATE = 0.8, 0.9

# Warps that run at once on a multiprocessor if a thread uses 128 registers, as the rules' tiles do.
WARPS = 16


def attainable(gpu: Gpu, dtype: torch.dtype, precision: str = "ieee") -> Ceilings | None:
    """Return the rates that a card is assumed to reach, from its data sheet; None if its data sheet is unknown."""
    plain = bool(rules.without_tensor_cores(dtype, gpu, precision))
    sheet = stated(gpu.name, torch.float32) if plain else stated(gpu.name, dtype, precision)
    return sheet and Ceilings(OF_MATRIX_RATE * sheet.tflops, OF_MEMORY_RATE * sheet.gb_per_s)


def conv_seconds(layer: Layer, config: ConvConfig, gpu: Gpu, limits: Ceilings) -> float:
    """Estimate a layer's time from whole waves of tiles, traffic to L2 and memory, and the chain of reduction steps."""
    shape, size = layer.shape, getattr(torch, layer.dtype).itemsize
    rows = cdiv(shape.M, config.block_m)
    if config.kernel in conv_tma.KERNELS:  # a tile is one pixel of BLOCK_M images
        rows = cdiv(shape.N, config.block_m) * shape.P * shape.Q
    elif config.kernel in conv_specialized.KERNELS:
        rows = conv_specialized.pixel_tiles(shape, conv_specialized.box_of(shape, config.block_m, config.kernel))
    tiles = rows * cdiv(shape.K, config.block_n) * shape.groups
    blocks = rules.reduction_blocks(shape, config)
    waves = cdiv(tiles * config.split, gpu.multiprocessors)
    flops = 2 * config.block_m * config.block_n * cdiv(blocks, config.split) * config.block_k
    compute = waves * flops / (limits.tflops * 1e12 / gpu.multiprocessors)
    through_l2 = tiles * (config.block_m + config.block_n) * blocks * config.block_k * size
    if config.split > 1:  # partial sums are written and read once, in float32
        through_l2 += 2 * 4 * tiles * config.split * config.block_m * config.block_n
    moved = shape.R * shape.S * shape.C * shape.K * shape.groups * size
    activations = shape.N * shape.H * shape.W * shape.C * shape.groups * size
    activations += shape.M * shape.K * shape.groups * (layer.out_dtype.itemsize + size * layer.residual)
    if activations > L2_SHARE * gpu.l2_cache:
        moved += activations
    chain = chain_seconds(layer, config, tiles * config.split, gpu)
    return max(compute, through_l2 / (L2_RATE * gpu.multiprocessors), moved / (limits.gb_per_s * 1e9), chain)


def chain_seconds(layer: Layer, config: ConvConfig, programs: int, gpu: Gpu) -> float:
    """Return the time of the programs that run in turn on a multiprocessor, each waiting for its loads and stores."""
    size = getattr(torch, layer.dtype).itemsize
    resident = max(1, min(WARPS // config.num_warps, gpu.shared_memory // _pipeline(config, size)))
    together = min(resident, cdiv(programs, gpu.multiprocessors))
    block = (config.block_m + config.block_n) * config.block_k * size
    step = max(together * block / L2_RATE, LOAD / max(1, config.num_stages - 1))
    rounds = cdiv(programs, resident * gpu.multiprocessors)
    sums = cdiv(rules.reduction_blocks(layer.shape, config), config.split) * step
    if persistent(config) or config.kernel in conv_specialized.KERNELS:
        # The loads of the next tile start before the current tile is finished.
        return LOAD + rounds * sums + LOAD
    seconds = LOAD + sums + LOAD
    if config.split > 1:  # the last program to arrive waits for the counter and reads all partial sums
        seconds += LOAD + 4 * (together + config.split) * config.block_m * config.block_n / L2_RATE
    return rounds * seconds


def _pipeline(config: ConvConfig, size: int) -> int:
    return max(1, config.num_stages - 1) * (config.block_m + config.block_n) * config.block_k * size


def network_seconds(
    plan: Plan,
    shape: Shape,
    dtype: torch.dtype,
    gpu: Gpu,
    limits: Ceilings,
    how: Network | None = None,
    route: Callable[..., ConvConfig] = rules.route_conv,
) -> float:
    """Return a network's time for a batch of ``shape`` (NHWC) in a CUDA graph. ``route`` configures its convolutions.

    ``how`` says how many images run at a time, and through which stage.
    """
    n, h, w, _ = shape

    def seconds(steps: Sequence[Step], images: int) -> float:
        shapes = plan.shapes(images, h, w)
        return sum(_step_seconds(step, shapes, dtype, gpu, limits, route) + kernels(step) * GAP for step in steps)

    if how is None or not 0 < how.images < n:
        return seconds(plan.steps, n)
    first = len(plan.steps_for((plan.features[how.through],)))
    whole, rest = divmod(n, how.images)
    found = whole * seconds(plan.steps[:first], how.images) + seconds(plan.steps[first:], n)
    return found + (seconds(plan.steps[:first], rest) if rest else 0.0)


def kernels(step: Step) -> int:
    """Return the number of dependent kernels of a step. The kernel that prepares a stem's images is not counted."""
    return 4 if isinstance(step, SqueezeExcite) else 2 if isinstance(step, Head) and step.weight.shape[0] else 1


def _step_seconds(
    step: Step,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    gpu: Gpu,
    limits: Ceilings,
    route: Callable[..., ConvConfig],
) -> float:
    """Estimate the time of a step. ``route`` configures its convolutions."""
    shape = shapes[step.input]
    if isinstance(step, Conv):
        layer = Layer.of(conv_shape(step, shape), dtype, step.residual is not None)
        config = route(layer.shape, dtype, gpu, float32_precision(), residual=layer.residual)
        return conv_seconds(layer, config, gpu, limits)
    cost = step_cost(step, shapes, dtype)
    if isinstance(step, Head) and step.weight.shape[0]:
        layer = Layer.of(linear_shape(step, shape), dtype, False, classifier=True)
        config = route(layer.shape, dtype, gpu, float32_precision())
        return _pool_seconds(shape, dtype, gpu, limits) + conv_seconds(layer, config, gpu, limits)
    return step_estimate(step, cost, dtype, gpu, limits)[0] or 0.0


def step_estimate(
    step: Step, cost: StepCost, dtype: torch.dtype, gpu: Gpu, limits: Ceilings
) -> tuple[float | None, str]:
    """Return the seconds of ``step`` and their source: ``"measured"`` (by the tuner, on this GPU) or ``"estimated"``.

    Return ``(None, "")`` for a kind of step that has neither.
    """
    shape = cost.input_shape
    if isinstance(step, Conv):
        return _conv_estimate(step, shape, dtype, gpu, limits)
    if isinstance(step, Joined):
        return _joined_estimate(step, cost, dtype, gpu, limits)
    if isinstance(step, (Pool, SqueezeExcite)):
        again = (
            math.prod(shape) * dtype.itemsize if isinstance(step, SqueezeExcite) else 0
        )  # the mean reads the input once more
        return (cost.bytes + again) / (limits.gb_per_s * 1e9), "estimated"
    if isinstance(step, Stem):
        return _stem_seconds(step, cost, dtype, gpu, limits), "estimated"
    if isinstance(step, Head):
        return _head_estimate(step, shape, dtype, gpu, limits)
    return None, ""


def _conv_estimate(step: Conv, shape: Shape, dtype: torch.dtype, gpu: Gpu, limits: Ceilings) -> tuple[float, str]:
    return _layer_estimate(Layer.of(conv_shape(step, shape), dtype, step.residual is not None), dtype, gpu, limits)


def _layer_estimate(layer: Layer, dtype: torch.dtype, gpu: Gpu, limits: Ceilings) -> tuple[float, str]:
    """Return the time measured for exactly this layer on this GPU, or else an estimate."""
    entry = dispatch.tuned_for(layer, gpu)
    if entry and entry.layer == layer and dispatch.tuned(gpu).measured(entry):
        return entry.microseconds / 1e6, "measured"
    routed = {"residual": layer.residual, "classifier": layer.classifier}
    config = dispatch.route(layer.shape, dtype, gpu, precision=float32_precision(), **routed)
    return conv_seconds(layer, config, gpu, limits), "estimated"


def _joined_estimate(step: Joined, cost: StepCost, dtype: torch.dtype, gpu: Gpu, limits: Ceilings) -> tuple[float, str]:
    """Return the time measured for exactly this run, or else an estimate, scaled from the nearest measured batch."""
    block = block_of(step, cost.input_shape, dtype)
    found = dispatch.route_block(block, dtype, gpu)
    if found is None:
        return max(cost.flops / (limits.tflops * 1e12), cost.bytes / (limits.gb_per_s * 1e9)), "estimated"
    seconds = found.microseconds / 1e6 * block.shape.N / found.layer.shape.N
    return seconds, "measured" if found.layer == block and dispatch.tuned(gpu).measured(found) else "estimated"


def _stem_seconds(step: Stem, cost: StepCost, dtype: torch.dtype, gpu: Gpu, limits: Ceilings) -> float:
    pixels = step.conv_shape(cost.input_shape)[:3]
    config = rules.route_stem(step.weight.shape[0], pixels, dtype, gpu, step.pool)
    n, p, q, _ = cost.output_shape
    if config.kernel == rules.STRIP:
        steps = rules.strip_steps(n, p, q, config.rows, gpu)
        return LOAD + steps * STRIP_STEP + _preparing(cost, dtype, limits)
    if step.pool:  # the last of 2·rows + 1 convolution rows is also the next program's first
        programs, again = stem_programs(n, p, q, config.block_q, config.rows), 1 + 1 / (2 * config.rows)
    else:
        programs, again = n * cdiv(p, config.rows) * cdiv(q, config.block_q), 1.0
    compute, memory = cost.flops * again / (limits.tflops * 1e12), cost.bytes / (limits.gb_per_s * 1e9)
    seconds = max(compute, memory) * _idle(programs, gpu)
    # A program's chain: one row of the filter at a time, for each of its convolution rows.
    steps = step.weight.shape[1] * (2 * config.rows + 1 if step.pool else config.rows)
    rounds = cdiv(programs, max(1, WARPS // config.num_warps) * gpu.multiprocessors)
    seconds = max(seconds, rounds * (2 * LOAD + steps * LOAD / max(1, config.num_stages - 1)))
    return seconds + _preparing(cost, dtype, limits) if config.prepared else seconds


def _preparing(cost: StepCost, dtype: torch.dtype, limits: Ceilings) -> float:
    """Return the time to write the prepared images, with four channels per pixel, and to read them again."""
    n, h, w, _ = cost.input_shape
    return 2 * 4 * n * h * w * dtype.itemsize / (limits.gb_per_s * 1e9)


def _head_estimate(step: Head, shape: Shape, dtype: torch.dtype, gpu: Gpu, limits: Ceilings) -> tuple[float, str]:
    """Return the time of the pool and of the classifier, if there is one. The pool's time is never measured."""
    pooling = _pool_seconds(shape, dtype, gpu, limits)
    if not step.weight.shape[0]:
        return pooling, "estimated"
    layer = Layer.of(linear_shape(step, shape), dtype, False, classifier=True)
    return pooling + _layer_estimate(layer, dtype, gpu, limits)[0], "estimated"


def _pool_seconds(shape: Shape, dtype: torch.dtype, gpu: Gpu, limits: Ceilings) -> float:
    """Return the time of the pool, which reads its input once, a block of pixels at a time."""
    n, h, w, c = shape
    pool = rules.route_pool(c, h * w)
    reading = n * h * w * c * dtype.itemsize / (limits.gb_per_s * 1e9) * _idle(n * cdiv(c, pool.block_c), gpu)
    return max(reading, LOAD * (1 + cdiv(h * w, pool.block_hw)))


def _idle(programs: int, gpu: Gpu) -> float:
    """Return the slowdown of ``programs`` because some multiprocessors are idle in the last wave."""
    return cdiv(programs, gpu.multiprocessors) * gpu.multiprocessors / programs
