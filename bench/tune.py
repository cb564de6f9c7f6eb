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
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from fastres.bench.measure.ceilings import measure
from fastres.bench.measure.environment import commit
from fastres.bench.report.results import check_folder
from fastres.bench.tuning import blocks, networks, vetting
from fastres.bench.tuning.configurations import by_weight, gpu_tools, layers_of
from fastres.bench.tuning.progress import Progress
from fastres.bench.tuning.tables import blocks_table, networks_table, table
from fastres.bench.tuning.tuner import tune, tune_blocks, tune_networks
from fastres.kernels import dispatch
from fastres.kernels.routing import tables
from fastres.kernels.routing.cards import gpu_of
from fastres.kernels.routing.tables import VARIABLE, Network, table_path
from fastres.program import run_program
from fastres.terminal import wrote

# With --seconds, layers end after the first share of the time and joined runs after the second; networks get the rest.
LAYERS_SHARE, BLOCKS_SHARE = 0.6, 0.85


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
    check_folder(options.out)
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
    wrote(progress.path)
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
    sys.exit(run_program(main, "python -m bench.tune"))
