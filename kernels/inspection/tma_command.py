"""Compile the TMA kernels for sm_90 without a GPU, and report their resources and problems.

``python -m fastres.kernels.inspection_tma`` compiles two of the candidate configurations for every convolution of a
model that a TMA kernel takes. It prints registers, spills and shared memory, and three counts: wgmma instructions that
take an operand through registers, copies into a buffer that do not wait until all warps have read it, and instructions
that write a register that a wgmma in flight still reads. All three should be 0, except the first in the fused kernel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
import triton

from fastres.program import run_program
from fastres.text import text_table

from .tma_kernels import ARCH, HEADER, inspect_tma_all, rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a kernel is not good, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m fastres.kernels.inspection_tma", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--model", default="resnet50", help="name of the model (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="batch size (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="image height and width (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args(arguments)
    from fastres.executors.compilations import tma_compilations

    items = tma_compilations(options.model, options.batch, getattr(torch, options.dtype), options.size)
    reports = inspect_tma_all(items)
    table = rows(items, reports)
    if options.markdown:
        lines = [HEADER, ("---",) * len(HEADER), *table]
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    else:
        print(text_table([HEADER, *table], right=range(3, 10)))
    bad = sum(not report.good for report in reports)
    print(f"\n{len(reports)} kernels for {ARCH}, Triton {triton.__version__}; {bad} not good")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m fastres.kernels.inspection_tma"))
