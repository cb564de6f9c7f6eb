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
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

from fastres.architectures import get_architecture
from fastres.ceilings import Ceilings
from fastres.errors import DeviceError
from fastres.folding import outline
from fastres.gpu import conv_shape
from fastres.kernels import conv, conv_specialized, conv_tma, dispatch, gemm, inspection_tables, reference, tables
from fastres.kernels.cards import Gpu, gpu_of
from fastres.kernels.launch import cdiv
from fastres.kernels.routing import ConvConfig, route_conv
from fastres.kernels.tables import VARIABLE, Layer, Network, Table, Tuned, TunedBlock, from_json, table_path, to_json
from fastres.plan import Conv
from fastres.prediction import conv_seconds
from fastres.text import text_table

from . import block_tuning, network_tuning
from .block_tuning import BlockTools, Case
from .ceilings import measure
from .results import write_whole

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

# For layers of fewer tiles than multiprocessors: several programs a tile. No more than leaves each four blocks to add.
SPLITS = (2, 4, 8, 16)
LEAST_BLOCKS = 4
SPLIT_TILES = [config for config in GENERAL if config.block_m == 64 and config.num_warps == 4]


@dataclass(frozen=True)
class Tools:
    """What the search does on a GPU, so that its logic can be tested without one."""

    compiles_well: Callable[[Layer, Sequence[ConvConfig]], list[ConvConfig]]
    is_right: Callable[[Layer, ConvConfig], bool]
    microseconds: Callable[[Layer, ConvConfig], float]


def layers(models: Iterable[str], batches: Iterable[int], size: int, dtype: torch.dtype) -> list[Layer]:
    """The distinct convolutions that the models run at these batches."""
    found: dict[Layer, None] = {}
    for name, batch in itertools.product(models, batches):
        plan = outline(get_architecture(name), dtype)
        shapes = plan.shapes(batch, size, size)
        for step in plan:
            if isinstance(step, Conv):
                found[Layer.of(conv_shape(step, shapes[step.input]), dtype, step.residual is not None)] = None
    return list(found)


def candidates(layer: Layer, gpu: Gpu) -> list[ConvConfig]:
    """Configurations of every kernel that takes the layer; the rules' own choice first."""
    shape, dtype = layer.shape, getattr(torch, layer.dtype)
    found = [route_conv(shape, dtype, gpu)]
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
    for config, split in itertools.product(SPLIT_TILES, SPLITS):
        blocks = shape.R * shape.S * cdiv(shape.C, config.block_k)
        programs = conv.conv_tiles(shape, config) * split
        if blocks >= LEAST_BLOCKS * split and programs <= 2 * gpu.multiprocessors:
            found.append(replace(config, split=split))
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
        raise DeviceError(f"The rules' own configuration {rules} is wrong or does not compile for {layer}")
    best = min(times, key=lambda config: times[config])
    return Tuned(layer, best, times[best], times[rules])


@dataclass
class Progress:
    """A table on its way, written after every entry."""

    path: Path
    facts: dict[str, object]
    table: Table

    @classmethod
    def resume(cls, path: Path, facts: dict[str, object]) -> Progress:
        """Go on with what ``path`` holds, if it is there."""
        return cls(path, facts, from_json(path.read_text(), str(path)) if path.is_file() else Table())

    def add(self, part: str, entry: Tuned | TunedBlock | Network) -> None:
        """Add to a part of the table, and write it."""
        self.table = replace(self.table, **{part: (*getattr(self.table, part), entry)})
        write_whole(self.path, to_json(self.table, self.facts).encode())

    def fill(
        self, part: str, todo: Mapping[Any, Any], known: Iterable[Any],
        run: Callable[[Any], Tuned | TunedBlock | Network | None],
    ) -> None:  # fmt: skip
        """Add what ``run`` makes of each item of ``todo`` (by what it is tuned for) that is not ``known``."""
        from tqdm import tqdm

        done = set(known)
        for item in tqdm([item for key, item in todo.items() if key not in done], desc=part, unit="entry"):
            if (entry := run(item)) is not None:
                self.add(part, entry)


def tune(todo: Sequence[Layer], gpu: Gpu, limits: Ceilings, tools: Tools, progress: Progress) -> None:
    """Tune the layers that are not in the table yet."""

    def run(layer: Layer) -> Tuned:
        return tune_layer(layer, promising(layer, candidates(layer, gpu), gpu, limits), tools)

    known = (entry.layer for entry in progress.table.layers)
    progress.fill("layers", {layer: layer for layer in todo}, known, run)


def tune_blocks(todo: Sequence[Case], gpu: Gpu, tools: BlockTools, progress: Progress) -> None:
    """Tune the joined runs that are not in the table yet."""

    def run(case: Case) -> TunedBlock | None:
        return block_tuning.tune_block(case, block_tuning.candidates(case.block, gpu), tools)

    known = (entry.layer for entry in progress.table.blocks)
    progress.fill("blocks", {case.block: case for case in todo}, known, run)


def tune_networks(todo: Sequence[Network], run: Callable[[Network], Network], progress: Progress) -> None:
    """Tune the networks that are not in the table yet."""
    known = (entry.case for entry in progress.table.networks)
    progress.fill("networks", {network.case: network for network in todo}, known, run)


def gpu_tools(gpu: Gpu, pool: ProcessPoolExecutor) -> Tools:
    """Compile in ``pool``; check and time on the current GPU."""
    device = torch.device("cuda", torch.cuda.current_device())

    def compiles_well(layer: Layer, configs: Sequence[ConvConfig]) -> list[ConvConfig]:
        return inspection_tables.compiling_well(pool, gpu.arch, layer, configs)

    def is_right(layer: Layer, config: ConvConfig) -> bool:
        return error(layer, config, device) < 2 * torch.finfo(getattr(torch, layer.dtype)).eps

    def microseconds(layer: Layer, config: ConvConfig) -> float:
        x, weight, bias, residual = make_tensors(layer, device)
        shape = layer.shape
        y = torch.empty((shape.N, shape.P, shape.Q, weight.shape[0]), dtype=x.dtype, device=device)
        # As in a network, whose layers share them: making them is not part of the layer's time.
        arrived = torch.zeros(conv.arrivals(shape, config), dtype=torch.int32, device=device)

        def launch() -> None:
            _launch(layer, config, y, x, weight, bias, residual, arrived=arrived)

        return round(1000 * triton.testing.do_bench(launch, warmup=10, rep=40, return_mode="median"), 2)

    return Tools(compiles_well, is_right, microseconds)


@torch.no_grad()
def error(layer: Layer, config: ConvConfig, device: torch.device) -> float:
    """Relative L2 error of the layer's result against float32; not a number where some of it is not written."""
    x, weight, bias, residual = make_tensors(layer, device)
    shape = layer.shape
    y = torch.full((shape.N, shape.P, shape.Q, weight.shape[0]), float("nan"), dtype=x.dtype, device=device)
    _launch(layer, config, y, x, weight, bias, residual)
    with torch.backends.cudnn.flags(allow_tf32=False):
        truth = reference.conv2d(
            x.float(), weight.float(), bias, None if residual is None else residual.float(),
            stride=shape.stride, padding=shape.padding, groups=shape.groups, relu=True,
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


def _launch(
    layer: Layer, config: ConvConfig, y: torch.Tensor, *tensors: torch.Tensor | None,
    arrived: torch.Tensor | None = None,
) -> None:  # fmt: skip
    shape = layer.shape
    x, weight, bias, residual = tensors
    assert x is not None
    assert weight is not None
    assert bias is not None
    dispatch.convolve_into(
        y, x, weight, bias, residual, stride=shape.stride, padding=shape.padding, groups=shape.groups, relu=True,
        config=config, arrived=arrived,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune and print a short table, slowest layers first; exit status 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description="Tune the layers of models.")
    parser.add_argument("--model", nargs="+", default=["resnet50"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--out", type=Path, default=Path("out/configs"), help="folder of tables (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("fastres: tuning needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    gpu, dtype = gpu_of(device), getattr(torch, options.dtype)
    todo = layers(options.model, options.batch, options.size, dtype)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    facts: dict[str, object] = {"gpu": gpu.name, "arch": gpu.arch, **versions}
    progress = Progress.resume(table_path(gpu.name, options.out), facts)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        tune(todo, gpu, measure(device, dtype), gpu_tools(gpu, pool), progress)
        _use(options.out)  # joined runs and networks are measured against tuned layers
        cases = block_tuning.cases(options.model, options.batch, options.size, dtype, gpu)
        tune_blocks(cases, gpu, block_tuning.block_tools(gpu, pool), progress)
    _use(options.out)

    def run(network: Network) -> Network:
        joins = bool(progress.table.blocks)
        return network_tuning.on_gpu(network.model, network.batch, network.height, dtype, joins)

    tune_networks(network_tuning.todo(options.model, options.batch, options.size, dtype), run, progress)
    print(table(progress.table.layers))
    print(f"\n{blocks_table(progress.table.blocks)}\n\n{networks_table(progress.table.networks)}")
    print(f"{progress.path}: FASTRES_CONFIGS={options.out} uses it")
    return 0


def _use(folder: Path) -> None:
    """Route by the tables in ``folder`` from here on."""
    os.environ[VARIABLE] = str(folder)
    tables.table.cache_clear()
    dispatch.route.cache_clear()


def blocks_table(entries: Sequence[TunedBlock]) -> str:
    """What joining saves or costs, most saved first."""
    lines = [("joined run", "kernel", "configuration", "µs", "one by one µs")]
    for entry in sorted(entries, key=lambda entry: entry.microseconds - entry.apart_microseconds):
        block, shape = entry.layer, entry.layer.shape
        chain = [str(shape.C), *([str(shape.K)] if block.fused else []), str(block.channels)]
        chain += [str(block.next_channels)] * bool(block.next_channels)
        name = f"N{shape.N} {shape.P}×{shape.Q} {shape.R}×{shape.S}/{shape.stride} {'→'.join(chain)}"
        name += f" shortcut {block.shortcut_channels}/{block.shortcut_stride}" * bool(block.shortcut_channels)
        times = (f"{entry.microseconds:.1f}", f"{entry.apart_microseconds:.1f}")
        lines.append((name, entry.config.kernel, str(entry.config), *times))
    return text_table(lines, right=(3, 4))


def networks_table(entries: Sequence[Network]) -> str:
    """How whole networks run fastest."""
    lines = [("network", "batch", "joined", "besides", "µs", "plain µs")]
    for entry in entries:
        times = (f"{entry.microseconds:.0f}", f"{entry.plain_microseconds:.0f}")
        lines.append((entry.model, str(entry.batch), "yes" if entry.joined else "no", entry.manner or "-", *times))
    return text_table(lines, right=(1, 4, 5))


def table(entries: Sequence[Tuned], rows: int = 20) -> str:
    """The slowest layers: what was chosen and what the rules' own choice took."""
    lines = [("layer", "kernel", "configuration", "µs", "rules µs")]
    for entry in sorted(entries, key=lambda entry: -entry.microseconds)[:rows]:
        shape = entry.layer.shape
        name = f"N{shape.N} {shape.H}×{shape.W} {shape.R}×{shape.S}/{shape.stride} {shape.C}→{shape.K}"
        name += f" g{shape.groups}" * (shape.groups > 1) + " +res" * entry.layer.residual
        times = (f"{entry.microseconds:.1f}", f"{entry.rules_microseconds:.1f}")
        lines.append((name, entry.config.kernel, str(entry.config), *times))
    return text_table(lines, right=(3, 4))


if __name__ == "__main__":
    sys.exit(main())
