"""Tune one layer: choose the configurations to try, check whether each is correct, and time it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch
import triton

from fastres.bench.measure.timing import launch_microseconds
from fastres.errors import DeviceError
from fastres.folding.build import outline
from fastres.kernels import conv, conv_specialized, conv_tma, dispatch, gemm, reference
from fastres.kernels.inspection import tuned_tables
from fastres.kernels.routing.cards import Gpu
from fastres.kernels.routing.rules import ConvConfig, reduction_blocks, route_conv, splits
from fastres.kernels.routing.tables import Layer, Tuned
from fastres.network.architectures import get_architecture
from fastres.network.plan import Conv, Head
from fastres.roofline.ceilings import Ceilings
from fastres.roofline.estimate import conv_seconds
from fastres.roofline.gpu_shapes import conv_shape, linear_shape

from .progress import Progress, runs_right

# A candidate is not tried if its estimate is more than this many times the best estimate. The model covers waves,
# arithmetic and tile traffic, but not latency or pipelining, so it only excludes candidates that are much slower.
FAR_OFF = 1.6

# The number of tiles tried per kind of kernel, and of choices of depth, warps and stages per tile.
TILES_TRIED, VARIANTS_TRIED = 4, 3

GENERAL = [
    ConvConfig("conv", m, n, k, warps, stages)
    for (m, n), k, warps, stages in itertools.product(
        ((64, 32), (64, 64), (128, 32), (128, 64), (64, 128), (128, 128), (128, 256), (256, 128)),
        (32, 64, 128), (4, 8), (3, 4, 5),
    )
]  # fmt: skip

TMA = [*gemm.CANDIDATES, *conv_tma.CANDIDATES, *conv_specialized.CANDIDATES]

# Programs per tile for layers with fewer tiles than multiprocessors, if the rules allow it (rules.splits).
SPLITS = (2, 3, 4, 6, 8, 12, 16)
SPLIT_TILES = [config for config in GENERAL if config.block_m == 64 and config.num_warps == 4]


@dataclass(frozen=True)
class Tools:
    """The search's operations that need a GPU, separate so that its logic can be tested without one."""

    compiles_well: Callable[[Layer, Sequence[ConvConfig]], list[ConvConfig]]
    is_right: Callable[[Layer, ConvConfig], bool]
    microseconds: Callable[[Layer, ConvConfig], float]
    announce: Callable[[Mapping[Layer, Sequence[ConvConfig]]], object] = lambda plans: None  # what to compile


def layers_of(models: Iterable[str], batches: Iterable[int], size: int, dtype: torch.dtype) -> list[Layer]:
    """Return the distinct convolutions that the models run at these batches, including the classifier."""
    found: dict[Layer, None] = {}
    for name, batch in itertools.product(models, batches):
        plan = outline(get_architecture(name), dtype)
        shapes = plan.shapes(batch, size, size)
        for step in plan:
            if isinstance(step, Conv):
                found[Layer.of(conv_shape(step, shapes[step.input]), dtype, step.residual is not None)] = None
            elif isinstance(step, Head) and step.weight.shape[0]:
                found[Layer.of(linear_shape(step, shapes[step.input]), dtype, False, classifier=True)] = None
    return list(found)


def by_rules(layer: Layer, gpu: Gpu) -> ConvConfig:
    """Return the configuration that the rules choose for a layer."""
    return route_conv(layer.shape, getattr(torch, layer.dtype), gpu, residual=layer.residual)


def candidates(layer: Layer, gpu: Gpu) -> list[ConvConfig]:
    """Return configurations of every kernel that supports the layer, the rules' own choice first."""
    shape = layer.shape
    found = [by_rules(layer, gpu)]
    for config in [*GENERAL, *split_candidates(layer, gpu), *TMA]:
        too_wide = config.block_n > max(32, triton.next_power_of_2(shape.K))
        too_deep = config.block_k > max(16, triton.next_power_of_2(shape.C))
        if not too_wide and not too_deep and not dispatch.why_not_layer(config.kernel, layer, gpu):
            found.append(config)
    return list(dict.fromkeys(found))


def split_candidates(layer: Layer, gpu: Gpu) -> list[ConvConfig]:
    """Return configurations in which programs share tiles, if tiles alone leave more than half of the GPU idle."""
    shape = layer.shape
    found = []
    for config in SPLIT_TILES:
        most = 2 * gpu.multiprocessors // conv.conv_tiles(shape, config)
        parts = splits(reduction_blocks(shape, config), most)
        found += [replace(config, split=split) for split in parts if split in SPLITS]
    return found


def promising(layer: Layer, configs: Sequence[ConvConfig], gpu: Gpu, limits: Ceilings) -> list[ConvConfig]:
    """Return the rules' choice and, for each kind of kernel, a few variants of the tiles with the best estimates."""
    times = {config: conv_seconds(layer, config, gpu, limits) for config in configs}
    bar = FAR_OFF * min(times.values())
    kinds: dict[tuple[str, bool], dict[tuple[int, int], list[ConvConfig]]] = {}
    # If estimates are equal, the larger tile comes first, because it reads less.
    for config in sorted(configs, key=lambda config: (times[config], -config.block_m * config.block_n)):
        if times[config] <= bar:
            tiles = kinds.setdefault((config.kernel, config.split > 1), {})
            if len(tiles) < TILES_TRIED or (config.block_m, config.block_n) in tiles:
                tiles.setdefault((config.block_m, config.block_n), []).append(config)
    variants = [_spread(found, VARIANTS_TRIED) for tiles in kinds.values() for found in tiles.values()]
    return list(dict.fromkeys([configs[0], *itertools.chain.from_iterable(variants)]))


def _spread(configs: Sequence[ConvConfig], count: int) -> list[ConvConfig]:
    """Return ``count`` configurations at even distances, including the first."""
    step = max(1, len(configs) / count)
    return [configs[int(index * step)] for index in range(min(count, len(configs)))]


def tune_layer(layer: Layer, configs: Sequence[ConvConfig], tools: Tools) -> Tuned:
    """Return the fastest of ``configs`` that compiles well and is correct. The rules' own choice must come first."""
    rules = configs[0]
    good = tools.compiles_well(layer, configs)
    times = {config: tools.microseconds(layer, config) for config in good if tools.is_right(layer, config)}
    if rules not in times:
        found = f"; {len(times)} of {len(configs)} configurations are correct" if times else ""
        failed = f"The rules' own configuration {rules.kernel} {rules} gives wrong results or does not compile"
        raise DeviceError(f"{failed} for {layer}{found}")
    best = min(times, key=lambda config: times[config])
    return Tuned(layer, best, times[best], times[rules])


def by_weight(todo: Sequence[Layer], gpu: Gpu, limits: Ceilings) -> list[Layer]:
    """Sort layers by their estimated time with the rules' choice, longest first."""

    def seconds(layer: Layer) -> float:
        return conv_seconds(layer, by_rules(layer, gpu), gpu, limits)

    return sorted(todo, key=seconds, reverse=True)


def gpu_tools(gpu: Gpu, pool: ProcessPoolExecutor, progress: Progress) -> Tools:
    """Return tools that compile in ``pool``, and check and time on the current GPU.

    ``announce`` starts all compilations at once.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    compiling: dict[tuple[Layer, ConvConfig], Future[bool]] = {}

    def announce(plans: Mapping[Layer, Sequence[ConvConfig]]) -> None:
        for layer, config in ((layer, config) for layer, configs in plans.items() for config in configs):
            compiling[layer, config] = pool.submit(tuned_tables.compiles_well, tuned_tables.Entry(gpu, layer, config))

    def compiles_well(layer: Layer, configs: Sequence[ConvConfig]) -> list[ConvConfig]:
        return [config for config in configs if compiling.pop((layer, config)).result()]

    def is_right(layer: Layer, config: ConvConfig) -> bool:
        with progress.trying(layer, config):
            what = f"{config.kernel} {config} for {layer}"
            return runs_right(lambda: error(layer, config, device), layer.dtype, what, progress)

    def microseconds(layer: Layer, config: ConvConfig) -> float:
        x, weight, bias, residual = make_tensors(layer, device)
        shape = layer.shape
        y = torch.empty((shape.N, shape.P, shape.Q, weight.shape[0]), dtype=layer.out_dtype, device=device)
        # Created outside the timed call, because the layers of a network share these counters.
        arrived = torch.zeros(conv.arrivals(shape, config), dtype=torch.int32, device=device)

        def once() -> None:
            launch(layer, config, y, x, weight, bias, residual, arrived=arrived)

        with progress.trying(layer, config):
            return launch_microseconds(once)

    return Tools(compiles_well, is_right, microseconds, announce)


@torch.no_grad()
def error(layer: Layer, config: ConvConfig, device: torch.device) -> float:
    """Return the relative L2 error of the layer's result against float32, or NaN if part of it was not written."""
    x, weight, bias, residual = make_tensors(layer, device)
    shape = layer.shape
    y = torch.full((shape.N, shape.P, shape.Q, weight.shape[0]), float("nan"), dtype=layer.out_dtype, device=device)
    launch(layer, config, y, x, weight, bias, residual)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        truth = reference.conv2d(
            x.float(), weight.float(), bias, None if residual is None else residual.float(),
            stride=shape.stride, padding=shape.padding, groups=shape.groups, relu=layer.relu,
        )  # fmt: skip
    return float((y.float() - truth).norm() / truth.norm())


def make_tensors(
    layer: Layer, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return random input, weight, bias and residual tensors for a layer."""
    shape, dtype = layer.shape, getattr(torch, layer.dtype)
    x = torch.randn(shape.N, shape.H, shape.W, shape.C * shape.groups, device=device, dtype=dtype)
    weight = torch.randn(shape.K * shape.groups, shape.R, shape.S, shape.C, device=device)
    weight = (weight / (shape.R * shape.S * shape.C) ** 0.5).to(dtype)
    bias = torch.randn(shape.K * shape.groups, device=device)
    size = (shape.N, shape.P, shape.Q, shape.K * shape.groups)
    return x, weight, bias, torch.randn(size, device=device, dtype=dtype) if layer.residual else None


def launch(
    layer: Layer, config: ConvConfig, y: torch.Tensor, *tensors: torch.Tensor | None,
    arrived: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Run the layer on the tensors of :func:`make_tensors` and write the result into ``y``."""
    shape = layer.shape
    x, weight, bias, residual = tensors
    assert x is not None
    assert weight is not None
    assert bias is not None
    dispatch.convolve_into(
        y, x, weight, bias, residual, stride=shape.stride, padding=shape.padding, groups=shape.groups, relu=layer.relu,
        config=config, arrived=arrived,
    )  # fmt: skip
