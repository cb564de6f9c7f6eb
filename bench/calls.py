"""Show where the time of one image goes on a CPU: ``python -m bench.calls``.

Each row is a network and a number of threads. It compares oneDNN's primitives in one loop of machine code with
primitives that Python calls one by one, and with calls through torch's operators, in one process and in turns. The
first column is the whole call of a model: the primitives, and the checks of its input and its tensors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fastres
from fastres.arguments import whole_number
from fastres.bench.measure import environment, timing
from fastres.bench.measure.calibration import calibrated, smooth_images
from fastres.bench.report.results import check_folder, significant, write_json
from fastres.errors import InputError
from fastres.executors import direct
from fastres.executors.cpu import CpuExecutor
from fastres.executors.quota import limit_threads, suitable_threads, threads
from fastres.model.model import parse_dtype
from fastres.network.architectures import Architecture, get_architecture
from fastres.program import run_program
from fastres.terminal import progress_bar, wrote
from fastres.text import dtype_name, text_table

JSON_NAME = "calls.json"
DEVICE = torch.device("cpu")
BUDGET = timing.Budget(seconds=6, fewest=20, most=400, warmups=5)
NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet20", "resnet56")
SHOWN = ("model", "primitives", "one_by_one", "operators")


@torch.inference_mode()
def measured(arch: Architecture, dtype: torch.dtype, count: int) -> dict[str, Any]:
    """Return the times of one image on ``count`` threads, in milliseconds."""
    model = fastres.load(arch.name, calibrated(arch).state_dict(), num_classes=arch.num_classes, dtype=dtype)
    size = model.transforms.crop
    x = smooth_images(1, size, size).to(dtype)
    with threads(count):
        primitives, operators = CpuExecutor(model.plan), CpuExecutor(model.plan)
        one_by_one = CpuExecutor(model.plan)
        assert one_by_one.direct is not None
        one_by_one.direct.machine_code = False
        operators.direct = None
        calls = {
            "model": partial(model, x),
            "primitives": partial(primitives.run, x),
            "one_by_one": partial(one_by_one.run, x),
            "operators": partial(operators.run, x),
        }
        times = {name: median(ms) for name, ms in timing.interleaved(calls, DEVICE, BUDGET).items()}
    return {
        "model": arch.name,
        "size": size,
        "dtype": dtype_name(dtype),
        "threads": count,
        **{f"{name}_ms": significant(ms) for name, ms in times.items()},
        "ratio": significant(times["primitives"] / times["operators"], 3),
        "loop_ratio": significant(times["primitives"] / times["one_by_one"], 3),
    }


def summary(found: dict[str, Any]) -> str:
    """Return the rows as a table."""
    table = [["model", "dtype", "threads", "model's call", "primitives", "one by one", "operators", "ratio"]]
    for row in found["rows"]:
        times = [f"{row[f'{name}_ms']:.4g} ms" for name in SHOWN]
        table.append([row["model"], row["dtype"], str(row["threads"]), *times, f"{row['ratio']:.2f}"])
    return text_table(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write it if ``--out`` is given."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    if options.out:
        check_folder(options.out)
    if reason := direct.absent():
        raise InputError(f"There is nothing to compare: {reason}")
    limit_threads()
    settings = [
        (get_architecture(model), dtype, whole_number(count, "--threads"))
        for model in options.model
        for dtype in (parse_dtype(name) or torch.float32 for name in options.dtype)
        for count in options.threads or sorted({1, suitable_threads()})
    ]
    command = " ".join(["python", "-m", "bench.calls", *arguments])
    facts = environment.describe(DEVICE, command, "random, calibrated", tf32=False, cold=False, ceilings={})
    found: dict[str, Any] = {"environment": facts, "rows": []}
    with progress_bar(total=len(settings), desc="Timing", disable=None) as progress:
        for setting in settings:
            found["rows"].append(measured(*setting))
            progress.update(1)
    print(summary(found))
    if options.out:
        write_json(options.out / JSON_NAME, found)
        wrote(options.out / JSON_NAME)
        print(f"Wrote {options.out / JSON_NAME}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.calls",
        description="Show where the time of one image goes on this CPU, with few and many threads.",
    )
    add = parser.add_argument
    add("--model", nargs="+", default=list(NETWORKS), help=f"networks (default: {' '.join(NETWORKS)})")
    add("--dtype", nargs="+", default=["float32"], help="dtypes (default: float32)")
    add("--threads", nargs="+", type=int, help="numbers of threads (default: 1, and one for each usable core)")
    add("--out", type=Path, help=f"output folder for {JSON_NAME}")
    return parser


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m bench.calls"))
