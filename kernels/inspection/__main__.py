"""Compile kernels without a GPU, and report their resources and problems.

``python -m fastres.kernels.inspection`` compiles every kernel that a model would launch: for NVIDIA sm_80, sm_89 and
sm_90 and AMD gfx942, or for the architectures or cards that ``--arch`` names. It prints registers, spills, shared
memory, matrix instructions and problems. All numbers are read from the compiled code; nothing runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
import triton

from fastres.kernels.conv_8bit import E4M3, LEVELS, why_not_8bit
from fastres.kernels.routing.cards import KNOWN_GPUS, card
from fastres.program import run_program

from .ahead_of_time import Compilation
from .pointer_kernels import Report, fence_note, inspect_all, table

KINDS_8BIT = {"int8": LEVELS, "e4m3": E4M3}  # no rule chooses these kernels yet


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a kernel has a problem, else 0."""
    from fastres.executors.compilations import plan_compilations, plan_compilations_8bit
    from fastres.folding.build import outline
    from fastres.network.architectures import get_architecture

    parser = argparse.ArgumentParser(
        prog="python -m fastres.kernels.inspection", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--model", default="resnet50", help="name of the model (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 256], help="batch sizes (default: 1 256)")
    parser.add_argument("--size", type=int, default=224, help="image height and width (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32", *KINDS_8BIT], default="float16")
    parser.add_argument(
        "--arch", nargs="+", metavar="ARCH", default=list(KNOWN_GPUS),
        help=f"architectures (sm_86, gfx942, …) or names of known cards (default: {' '.join(KNOWN_GPUS)})",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    in_8_bit = KINDS_8BIT.get(options.dtype)
    dtype = in_8_bit or getattr(torch, options.dtype)
    compilations = plan_compilations_8bit if in_8_bit else plan_compilations
    plan = outline(get_architecture(options.model), torch.float16 if in_8_bit else dtype)
    reports: list[Report] = []
    for gpu in map(card, options.arch):
        if in_8_bit and (reason := why_not_8bit(in_8_bit, gpu)):
            print(f"Nothing to compile for {gpu.arch}: {reason}")
            continue
        items: dict[Compilation, None] = {}
        for batch in options.batch:
            size = options.size
            made = compilations(plan, gpu, batch=batch, height=size, width=size, dtype=dtype)
            items |= dict.fromkeys(made)
        reports += inspect_all(items, gpu)
    print(table(reports))
    if note := fence_note(reports):
        print(note)
    bad = sum(bool(report.problems) for report in reports)
    print(f"{len(reports)} kernels, Triton {triton.__version__}; {bad} not good")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m fastres.kernels.inspection"))
