"""Time a network on a CPU with channels-last activations and with blocks of channels: ``python -m bench.layouts``.

Both compute in float32 on the same weights, in one process, in turns. ``layouts.json`` in ``--out`` has a row for each
network, batch and size. :mod:`fastres.executors.layouts` chooses by these results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastres.arguments import whole_number
from fastres.bench.measure import environment, timing
from fastres.bench.measure.calibration import calibrated, smooth_images
from fastres.bench.report.results import check_folder, significant, write_json
from fastres.errors import InputError
from fastres.executors import direct
from fastres.executors.cpu import CpuExecutor
from fastres.executors.direct_runs import Prepared
from fastres.executors.layouts import can_be_blocked, is_faster_blocked
from fastres.folding.build import build_plan
from fastres.network.architectures import Architecture, get_architecture
from fastres.network.plan import INPUT, LOGITS
from fastres.program import run_program
from fastres.terminal import progress_bar, wrote
from fastres.text import text_table

JSON_NAME = "layouts.json"
DEVICE = torch.device("cpu")
NETWORKS = ("resnet18", "resnet50", "resnet20", "resnet56")
SIZES = {"imagenet": (64, 112, 160, 224), "deep": (64, 112, 160, 224), "cifar": (32,)}
BUDGET = timing.Budget(seconds=6, fewest=9, most=100, warmups=2)


def measured(
    arch: Architecture, batches: Sequence[int], sizes: Sequence[int], done: Callable[[], object]
) -> list[dict[str, Any]]:
    """Time a network for each batch and size. Raises ``InputError`` if it cannot run in both layouts here."""
    name = arch.name
    plan = build_plan(calibrated(arch).state_dict(), arch)
    run = CpuExecutor(plan)
    lanes = None if run.direct is None else run.direct.library.lanes
    if run.direct is None or lanes is None or not can_be_blocked(plan, lanes):
        reason = direct.absent() or ("the processor has no AVX2" if lanes is None else f"{name} is never in blocks")
        raise InputError(f"There is nothing to compare for {name}: {reason}")
    rows = []
    for size, batch in product(sizes, batches):
        shape = (batch, size, size, 3)
        prepared = {block: run.direct.prepare_in(block, shape, (LOGITS,)) for block in (None, lanes)}
        images = smooth_images(*shape[:3])
        calls = {str(block): partial(_call, run, found, images) for block, found in prepared.items()}
        last, blocked = (median(times) for times in timing.interleaved(calls, DEVICE, BUDGET).values())
        rows.append(
            {
                "model": name,
                "batch": batch,
                "size": size,
                "channels_last_ms": significant(last),
                "blocked_ms": significant(blocked),
                "ratio": significant(blocked / last, 3),
                "chosen": "blocks" if is_faster_blocked(shape, lanes, arch.features) else "channels-last",
            }
        )
        done()
    return rows


def _call(run: CpuExecutor, prepared: Prepared, images: Tensor) -> None:
    assert run.direct is not None
    run.direct.run(prepared, {INPUT: images.contiguous(memory_format=prepared.memory_format)})


def summary(found: dict[str, Any]) -> str:
    """Return the rows as a table."""
    head = ["model", "batch", "size", "channels-last", "blocks", "ratio", "fastres takes"]
    table = [head]
    for row in found["rows"]:
        times = (f"{row['channels_last_ms']:.4g} ms", f"{row['blocked_ms']:.4g} ms", f"{row['ratio']:.2f}")
        table.append([row["model"], str(row["batch"]), str(row["size"]), *times, row["chosen"]])
    return text_table(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write it if ``--out`` is given."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    if options.out:
        check_folder(options.out)
    batches = [whole_number(batch, "--batch") for batch in options.batch]
    settings = [(arch, options.size or SIZES[arch.stem]) for arch in map(get_architecture, options.model)]
    total = sum(len(batches) * len(sizes) for _, sizes in settings)
    command = " ".join(["python", "-m", "bench.layouts", *arguments])
    facts = environment.describe(DEVICE, command, "random, calibrated", tf32=False, cold=False, ceilings={})
    found: dict[str, Any] = {"environment": facts, "rows": []}
    with progress_bar(total=total, desc="Timing", disable=None) as progress:
        for arch, sizes in settings:
            found["rows"] += measured(arch, batches, sizes, partial(progress.update, 1))
    print(summary(found))
    if options.out:
        write_json(options.out / JSON_NAME, found)
        wrote(options.out / JSON_NAME)
        print(f"Wrote {options.out / JSON_NAME}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.layouts",
        description="Time networks on this CPU with channels-last activations and with blocks of channels.",
    )
    add = parser.add_argument
    add("--model", nargs="+", default=list(NETWORKS), help=f"networks (default: {' '.join(NETWORKS)})")
    add("--batch", nargs="+", type=int, default=[1, 2, 4, 8], help="batch sizes (default: 1 2 4 8)")
    add("--size", nargs="+", type=int, help="image sizes (default: 64 112 160 224, and 32 for the CIFAR networks)")
    add("--out", type=Path, help=f"output folder for {JSON_NAME}")
    return parser


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m bench.layouts"))
