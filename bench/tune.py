"""Find the fastest way to run models on this machine's GPU: ``python -m bench.tune``.

For every distinct convolution of the given models and batches, the tuner

1. lists the configurations that could run it,
2. drops those whose estimates are far above the best one,
3. compiles the rest in parallel without launching them, and drops those that spill registers or do not fit,
4. checks each result against float32, and
5. times the correct ones.

It then does the same for joined runs of convolutions that one kernel can compute (``tuning/blocks.py``), and finally
times the ways to run whole networks (``tuning/networks.py``). It writes the table after every entry, so an interrupted
run continues where it stopped. The table belongs in ``kernels/configs/<gpu>/``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from fastres.bench.measure.ceilings import measure
from fastres.bench.measure.environment import commit
from fastres.bench.tuning.blocks import BlockTools, Case
from fastres.bench.tuning.configurations import (
    Tools,
    by_rules,
    by_weight,
    candidates,
    gpu_tools,
    layers_of,
    promising,
    tune_layer,
)
from fastres.bench.tuning.progress import Progress
from fastres.bench.tuning.tables import blocks_table, networks_table, table
from fastres.bench.tuning.vetting import Vetted
from fastres.errors import DeviceError
from fastres.kernels import dispatch
from fastres.kernels.routing import tables
from fastres.kernels.routing.cards import Gpu, gpu_of
from fastres.kernels.routing.rules import ConvConfig
from fastres.kernels.routing.tables import VARIABLE, Layer, Network, Tuned, TunedBlock, table_path
from fastres.kernels.routing.without import left_out
from fastres.roofline.ceilings import Ceilings

from .tuning import blocks, networks, vetting

# With --seconds, layers end after the first share of the time and joined runs after the second; networks get the rest.
LAYERS_SHARE, BLOCKS_SHARE = 0.6, 0.85


def tune(
    todo: Sequence[Layer], gpu: Gpu, limits: Ceilings, tools: Tools, progress: Progress, vetted: Vetted | None = None
) -> None:
    """Tune the layers that are not in the table yet.

    Try the vetted candidates of a layer if there are any, and otherwise all promising ones. If the choice of the rules
    fails for a layer, record the problem and continue.
    """

    def chosen(layer: Layer) -> list[ConvConfig]:
        known = None if vetted is None else vetted.layers.get(layer)
        configs = promising(layer, candidates(layer, gpu), gpu, limits) if known is None else known
        own = by_rules(layer, gpu)
        return [own, *(c for c in configs if c != own and is_allowed(layer, c))]

    def is_allowed(layer: Layer, config: ConvConfig) -> bool:
        """Return True if ``config`` may run. Vetted candidates were chosen without this GPU and FASTRES_WITHOUT."""
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


def tune_blocks(
    todo: Sequence[Case], gpu: Gpu, tools: BlockTools, progress: Progress, vetted: Vetted | None = None
) -> None:
    """Tune the joined runs that are not in the table yet."""

    def run(case: Case) -> TunedBlock | None:
        known = None if vetted is None else vetted.blocks.get(case.block)
        configs = blocks.candidates(case.block, gpu) if known is None else known
        dtype = getattr(torch, case.block.dtype)
        allowed = [config for config in configs if not dispatch.why_not_block(config.kernel, case.block, dtype, gpu)]
        usable = [config for config in allowed if not progress.ended_a_process(case.block, config)]
        return blocks.tune_block(case, usable, tools)

    known = (entry.layer for entry in progress.table.blocks)
    progress.fill("blocks", {case.block: case for case in todo}, known, run)


def tune_networks(todo: Sequence[Network], run: Callable[[Network], Network], progress: Progress) -> None:
    """Tune the networks that are not in the table yet."""
    known = (entry.case for entry in progress.table.networks)
    progress.fill("networks", {network.case: network for network in todo}, known, run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, and print tables of the results. Return 2 without a GPU, and 75 if the time ran out."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description="Tune the layers of models for this GPU.")
    parser.add_argument("--model", nargs="+", default=["resnet50"], help="models to tune (default: resnet50)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256], help="default: 1 8 64 256")
    parser.add_argument("--size", type=int, default=224, help="image height and width (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--out", type=Path, default=Path("out/configs"), help="folder of tables (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="try only a few candidates per layer and run")
    parser.add_argument(
        "--seconds", type=int, metavar="S", help="start no new entry after S seconds; run again to continue"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("fastres: tuning needs a CUDA GPU, but torch finds none on this machine", file=sys.stderr)
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
    todo = by_weight(layers_of(*given), gpu, limits)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        tune(todo, gpu, limits, gpu_tools(gpu, pool, progress), until(LAYERS_SHARE), vetted)
        _use(options.out)  # joined runs and networks are measured against tuned layers
        joined = blocks.block_tools(gpu, pool, progress)
        tune_blocks(blocks.cases(*given, gpu), gpu, joined, until(BLOCKS_SHARE), vetted)
        pool.shutdown(cancel_futures=True)
    _use(options.out)

    def run(network: Network) -> Network:
        joins = bool(progress.table.blocks)
        return networks.on_gpu(network.model, network.batch, network.height, dtype, joins, options.quick)

    tune_networks(networks.todo(*given), run, until(1.0))
    parts = progress.table
    print("\n\n".join((table(parts.layers), blocks_table(parts.blocks), networks_table(parts.networks))))
    for problem in dict.fromkeys(progress.problems):
        print(f"Left out: {problem}")
    print(f"Wrote {progress.path}; set FASTRES_CONFIGS={options.out} to use it")
    if progress.unfinished:
        print(f"{progress.unfinished} entries were not started within {options.seconds} s; run again to continue")
        return os.EX_TEMPFAIL
    return 0


def _use(folder: Path) -> None:
    """Use the tables in ``folder`` for routing from now on."""
    os.environ[VARIABLE] = str(folder)
    tables.table.cache_clear()
    dispatch.route.cache_clear()


if __name__ == "__main__":
    sys.exit(main())
