"""``python -m bench.tune``: find the fastest way to run models on this machine's GPU.

For every distinct convolution of the given models and batches: list what could run it, drop what the roofline says
cannot be good, compile the rest in parallel with no launch and drop what spills or does not fit, check each result
against float32, and time those that are right. Then the same for runs of convolutions that one kernel can compute
(``block_tuning.py``), and last the ways to run whole networks (``network_tuning.py``). The table is written after every
entry, so that an interrupted run continues where it stopped; it belongs into ``kernels/configs/<gpu>/``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from fastres.architectures import get_architecture
from fastres.ceilings import Ceilings
from fastres.errors import DeviceError
from fastres.folding import outline
from fastres.gpu_shapes import conv_shape, linear_shape
from fastres.kernels import conv, conv_specialized, conv_tma, dispatch, gemm, inspection_tables, reference, tables
from fastres.kernels.cards import Gpu, gpu_of
from fastres.kernels.routing import ConvConfig, reduction_blocks, route_conv, splits
from fastres.kernels.tables import VARIABLE, Layer, Network, Tuned, TunedBlock, table_path
from fastres.kernels.without import left_out
from fastres.plan import Conv, Head
from fastres.prediction import conv_seconds

from . import block_tuning, network_tuning, vetting
from .block_tuning import BlockTools, Case
from .ceilings import measure
from .environment import commit
from .timing import launch_microseconds
from .tuning_progress import Progress
from .tuning_tables import blocks_table, networks_table, table
from .vetting import Vetted

# A candidate is not tried where its predicted time is more than this many times the best prediction. The model knows
# waves, arithmetic and tile traffic, not latency or pipelining, so it only rules out what is far off.
FAR_OFF = 1.6

# Of each kind of kernel so many tiles are tried, and of each tile so many choices of depth, warps and stages.
TILES_TRIED, VARIANTS_TRIED = 4, 3

GENERAL = [
    ConvConfig("conv", m, n, k, warps, stages)
    for (m, n), k, warps, stages in itertools.product(
        ((64, 32), (64, 64), (128, 32), (128, 64), (64, 128), (128, 128), (128, 256), (256, 128)),
        (32, 64, 128), (4, 8), (3, 4, 5),
    )
]  # fmt: skip

TMA = [*gemm.CANDIDATES, *conv_tma.CANDIDATES, *conv_specialized.CANDIDATES]

# With --seconds: joined runs and networks get what is left after these shares of the time.
LAYERS_SHARE, BLOCKS_SHARE = 0.6, 0.85

# For layers of fewer tiles than multiprocessors: so many programs a tile, where the rules allow it (routing.splits).
SPLITS = (2, 3, 4, 6, 8, 12, 16)
SPLIT_TILES = [config for config in GENERAL if config.block_m == 64 and config.num_warps == 4]


@dataclass(frozen=True)
class Tools:
    """What the search does on a GPU, so that its logic can be tested without one."""

    compiles_well: Callable[[Layer, Sequence[ConvConfig]], list[ConvConfig]]
    is_right: Callable[[Layer, ConvConfig], bool]
    microseconds: Callable[[Layer, ConvConfig], float]
    announce: Callable[[Mapping[Layer, Sequence[ConvConfig]]], object] = lambda plans: None  # what will be asked for


def layers(models: Iterable[str], batches: Iterable[int], size: int, dtype: torch.dtype) -> list[Layer]:
    """The distinct convolutions that the models run at these batches, the classifier among them."""
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
    """What the rules choose for a layer."""
    return route_conv(layer.shape, getattr(torch, layer.dtype), gpu, residual=layer.residual)


def candidates(layer: Layer, gpu: Gpu) -> list[ConvConfig]:
    """Configurations of every kernel that takes the layer; the rules' own choice first."""
    shape, dtype = layer.shape, getattr(torch, layer.dtype)
    found = [by_rules(layer, gpu)]
    for config in [*GENERAL, *split_candidates(layer, gpu), *TMA]:
        too_wide = config.block_n > max(32, triton.next_power_of_2(shape.K))
        too_deep = config.block_k > max(16, triton.next_power_of_2(shape.C))
        if not too_wide and not too_deep and not dispatch.why_not(config.kernel, shape, dtype, gpu):
            found.append(config)
    return list(dict.fromkeys(found))


def split_candidates(layer: Layer, gpu: Gpu) -> list[ConvConfig]:
    """Configurations whose programs share tiles, where tiles alone leave more than half of the GPU idle."""
    shape = layer.shape
    found = []
    for config in SPLIT_TILES:
        most = 2 * gpu.multiprocessors // conv.conv_tiles(shape, config)
        parts = splits(reduction_blocks(shape, config), most)
        found += [replace(config, split=split) for split in parts if split in SPLITS]
    return found


def promising(layer: Layer, configs: Sequence[ConvConfig], gpu: Gpu, limits: Ceilings) -> list[ConvConfig]:
    """The rules' own choice, and of each kind of kernel a few variants of the tiles predicted to be best."""
    times = {config: conv_seconds(layer, config, gpu, limits) for config in configs}
    bar = FAR_OFF * min(times.values())
    kinds: dict[tuple[str, bool], dict[tuple[int, int], list[ConvConfig]]] = {}
    # Of equal predictions the larger tile first: it reads less.
    for config in sorted(configs, key=lambda config: (times[config], -config.block_m * config.block_n)):
        if times[config] <= bar:
            tiles = kinds.setdefault((config.kernel, config.split > 1), {})
            if len(tiles) < TILES_TRIED or (config.block_m, config.block_n) in tiles:
                tiles.setdefault((config.block_m, config.block_n), []).append(config)
    variants = [_spread(found, VARIANTS_TRIED) for tiles in kinds.values() for found in tiles.values()]
    return list(dict.fromkeys([configs[0], *itertools.chain.from_iterable(variants)]))


def _spread(configs: Sequence[ConvConfig], count: int) -> list[ConvConfig]:
    """``count`` of the configurations, evenly spread, the first among them."""
    step = max(1, len(configs) / count)
    return [configs[int(index * step)] for index in range(min(count, len(configs)))]


def tune_layer(layer: Layer, configs: Sequence[ConvConfig], tools: Tools) -> Tuned:
    """The fastest of ``configs`` (the rules' own choice first) among those that compile well and are right."""
    rules = configs[0]
    good = tools.compiles_well(layer, configs)
    times = {config: tools.microseconds(layer, config) for config in good if tools.is_right(layer, config)}
    if rules not in times:
        found = f"; of {len(configs)} others {len(times)} are right" if times else ""
        raise DeviceError(f"The rules' own configuration {rules} is wrong or does not compile for {layer}{found}")
    best = min(times, key=lambda config: times[config])
    return Tuned(layer, best, times[best], times[rules])


def tune(
    todo: Sequence[Layer], gpu: Gpu, limits: Ceilings, tools: Tools, progress: Progress, vetted: Vetted | None = None
) -> None:
    """Tune the layers that are not in the table yet: the vetted candidates, where there are any, or all promising ones.

    A layer whose rules are wrong is a problem of the progress and not the end of it.
    """

    def chosen(layer: Layer) -> list[ConvConfig]:
        known = None if vetted is None else vetted.layers.get(layer)
        configs = promising(layer, candidates(layer, gpu), gpu, limits) if known is None else known
        own = by_rules(layer, gpu)
        return [own, *(c for c in configs if c != own and is_allowed(layer, c))]

    def is_allowed(layer: Layer, config: ConvConfig) -> bool:
        """Vetted candidates know nothing of this GPU, nor of what is left out on it."""
        if (config.split > 1 and "split" in left_out()) or progress.ended_a_process(layer, config):
            return False
        return not dispatch.why_not(config.kernel, layer.shape, getattr(torch, layer.dtype), gpu)

    known = {entry.layer for entry in progress.table.layers}
    plans = {layer: chosen(layer) for layer in todo if layer not in known}
    tools.announce(plans)

    def run(layer: Layer) -> Tuned | None:
        try:
            return tune_layer(layer, plans[layer], tools)
        except DeviceError as error:
            progress.problems.append(str(error))
            return None

    progress.fill("layers", {layer: layer for layer in plans}, (), run)


def by_weight(todo: Sequence[Layer], gpu: Gpu, limits: Ceilings) -> list[Layer]:
    """Layers, those first that the rules are predicted to spend most time on."""

    def seconds(layer: Layer) -> float:
        return conv_seconds(layer, by_rules(layer, gpu), gpu, limits)

    return sorted(todo, key=seconds, reverse=True)


def tune_blocks(
    todo: Sequence[Case], gpu: Gpu, tools: BlockTools, progress: Progress, vetted: Vetted | None = None
) -> None:
    """Tune the joined runs that are not in the table yet."""

    def run(case: Case) -> TunedBlock | None:
        known = None if vetted is None else vetted.blocks.get(case.block)
        configs = block_tuning.candidates(case.block, gpu) if known is None else known
        dtype = getattr(torch, case.block.dtype)
        allowed = [config for config in configs if not dispatch.why_not_block(config.kernel, case.block, dtype, gpu)]
        usable = [config for config in allowed if not progress.ended_a_process(case.block, config)]
        return block_tuning.tune_block(case, usable, tools)

    known = (entry.layer for entry in progress.table.blocks)
    progress.fill("blocks", {case.block: case for case in todo}, known, run)


def tune_networks(todo: Sequence[Network], run: Callable[[Network], Network], progress: Progress) -> None:
    """Tune the networks that are not in the table yet."""
    known = (entry.case for entry in progress.table.networks)
    progress.fill("networks", {network.case: network for network in todo}, known, run)


def gpu_tools(gpu: Gpu, pool: ProcessPoolExecutor, progress: Progress) -> Tools:
    """Compile in ``pool``, all that is announced at once; check and time on the current GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    compiling: dict[tuple[Layer, ConvConfig], Future[bool]] = {}

    def announce(plans: Mapping[Layer, Sequence[ConvConfig]]) -> None:
        for layer, config in ((layer, config) for layer, configs in plans.items() for config in configs):
            compiling[layer, config] = pool.submit(
                inspection_tables.compiles_well, inspection_tables.Entry(gpu, layer, config)
            )

    def compiles_well(layer: Layer, configs: Sequence[ConvConfig]) -> list[ConvConfig]:
        return [config for config in configs if compiling.pop((layer, config)).result()]

    def is_right(layer: Layer, config: ConvConfig) -> bool:
        with progress.trying(layer, config):
            return runs_right(lambda: error(layer, config, device), layer.dtype, f"{config} for {layer}", progress)

    def microseconds(layer: Layer, config: ConvConfig) -> float:
        x, weight, bias, residual = make_tensors(layer, device)
        shape = layer.shape
        y = torch.empty((shape.N, shape.P, shape.Q, weight.shape[0]), dtype=layer.out_dtype, device=device)
        # As in a network, whose layers share them: making them is not part of the layer's time.
        arrived = torch.zeros(conv.arrivals(shape, config), dtype=torch.int32, device=device)

        def once() -> None:
            launch(layer, config, y, x, weight, bias, residual, arrived=arrived)

        with progress.trying(layer, config):
            return launch_microseconds(once)

    return Tools(compiles_well, is_right, microseconds, announce)


def runs_right(error: Callable[[], float], dtype: str, what: str, progress: Progress) -> bool:
    """Whether a kernel's ``error`` is small. One that raises is a problem; one that breaks the GPU ends the process."""
    try:
        found = error()
    except (RuntimeError, triton.runtime.errors.TritonError) as problem:
        torch.cuda.synchronize()  # raises where the GPU can no longer be used: then this process is done
        progress.problems.append(f"{what} raises {type(problem).__name__}: {problem}".splitlines()[0])
        return False
    if not found < 2 * torch.finfo(getattr(torch, dtype)).eps:
        progress.problems.append(f"{what} is wrong: off by {found:.2e}")
        return False
    return True


@torch.no_grad()
def error(layer: Layer, config: ConvConfig, device: torch.device) -> float:
    """Relative L2 error of the layer's result against float32; not a number where some of it is not written."""
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
    """Random input, weight, bias and residual of a layer."""
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
    """Run the layer on input, weight, bias and residual (:func:`make_tensors`) into ``y``."""
    shape = layer.shape
    x, weight, bias, residual = tensors
    assert x is not None
    assert weight is not None
    assert bias is not None
    dispatch.convolve_into(
        y, x, weight, bias, residual, stride=shape.stride, padding=shape.padding, groups=shape.groups, relu=layer.relu,
        config=config, arrived=arrived,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune and print a short table, slowest layers first; exit status 2 without a GPU, 75 where time ran out."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description="Tune the layers of models.")
    parser.add_argument("--model", nargs="+", default=["resnet50"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--out", type=Path, default=Path("out/configs"), help="folder of tables (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few candidates of each layer and run")
    parser.add_argument("--seconds", type=int, metavar="S", help="begin nothing after so many; run again to go on")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("fastres: tuning needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        return 2
    start = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    gpu, dtype = gpu_of(device), getattr(torch, options.dtype)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "commit": commit()}
    facts = {"gpu": gpu.name, "arch": gpu.arch, "multiprocessors": gpu.multiprocessors, **versions}
    progress = Progress.resume(table_path(gpu.name, options.out), facts, table_path(gpu.name))
    vetted = vetting.read(gpu.arch) if options.quick else None

    def until(share: float) -> Progress:
        return progress.until(None if options.seconds is None else start + share * options.seconds)

    given = (options.model, options.batch, options.size, dtype)
    limits = measure(device, dtype)
    todo = by_weight(layers(*given), gpu, limits)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        tune(todo, gpu, limits, gpu_tools(gpu, pool, progress), until(LAYERS_SHARE), vetted)
        _use(options.out)  # joined runs and networks are measured against tuned layers
        blocks = block_tuning.block_tools(gpu, pool, progress)
        tune_blocks(block_tuning.cases(*given, gpu), gpu, blocks, until(BLOCKS_SHARE), vetted)
        pool.shutdown(cancel_futures=True)
    _use(options.out)

    def run(network: Network) -> Network:
        joins = bool(progress.table.blocks)
        return network_tuning.on_gpu(network.model, network.batch, network.height, dtype, joins, options.quick)

    tune_networks(network_tuning.todo(*given), run, until(1.0))
    parts = progress.table
    print("\n\n".join((table(parts.layers), blocks_table(parts.blocks), networks_table(parts.networks))))
    for problem in dict.fromkeys(progress.problems):
        print(f"Left out: {problem}")
    print(f"{progress.path}: FASTRES_CONFIGS={options.out} uses it")
    if progress.unfinished:
        print(f"{progress.unfinished} entries were not begun in {options.seconds} s; run again to go on")
        return os.EX_TEMPFAIL
    return 0


def _use(folder: Path) -> None:
    """Route by the tables in ``folder`` from here on."""
    os.environ[VARIABLE] = str(folder)
    tables.table.cache_clear()
    dispatch.route.cache_clear()


if __name__ == "__main__":
    sys.exit(main())
