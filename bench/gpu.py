"""Run tests, tuning and benchmarks on this machine's GPU, and keep every result: ``make gpu VISIT=first``.

A visit is a list of pieces (``visit/pieces.py``), most valuable first. Each piece runs in its own process and is
stopped at its time limit, so that one failure does not stop the visit. If a kernel family's trial crashes, hangs or
gives wrong results, only that family is left out of the later pieces. After each piece, all results so far go into one
archive, which ``make gpu-home`` unpacks. A piece runs again only when a file that it depends on has changed, and even
then its earlier rows are kept. Each card has its own folder. A visit does not access the internet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastres.bench.visit import state as states
from fastres.bench.visit.pieces import BUDGET, VISITS
from fastres.bench.visit.running import RESULTS
from fastres.bench.visit.visit import Visit
from fastres.errors import FastresError
from fastres.kernels.routing import tables
from fastres.program import run_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a visit. Return 1 if a piece failed or did not finish, and 2 without a GPU or after a ``FastresError``."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="Run tests, tuning and benchmarks on this machine's GPU."
    )
    parser.add_argument("visit", nargs="?", choices=(*VISITS, "all"), default="first", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for the archive (%(default)s)")
    parser.add_argument(
        "--work", type=Path, default=Path("out/gpu"), help="folder with a subfolder for each card (%(default)s)"
    )
    parser.add_argument(
        "--budget", type=float, metavar="S", help=f"time limit in seconds (default {BUDGET}; no limit for 'all')"
    )
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="PIECE", help="run only these pieces, even if their results are known"
    )
    parser.add_argument("--again", action="store_true", help="also run pieces whose results are known")
    parser.add_argument("--dry", action="store_true", help="print the pieces to run and their times; needs no GPU")
    parser.add_argument(
        "--rehearse", action="store_true", help="run the whole visit on a simulated GPU, with injected faults"
    )
    options = parser.parse_args(arguments)
    if options.rehearse:
        from fastres.bench.visit.rehearsal import rehearse

        return rehearse(options.out)
    if not torch.cuda.is_available() and not options.dry:
        print("fastres: make gpu needs a CUDA GPU, but torch finds none on this machine", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    budget = options.budget or (float("inf") if options.visit == "all" else BUDGET)
    folder = options.work.resolve() / tables.slug(card)
    try:
        before = (RESULTS / tables.slug(card) / states.STATE,)
        out = options.out.resolve()
        visit = Visit(options.visit, card, folder, out, budget, before=before, again=options.again, only=options.only)
        if options.dry:
            print(visit.plan([piece for piece in visit.todo if visit.is_due(piece)]))
            return 0
        return visit.run()
    except FastresError as error:
        print(f"python -m bench.gpu: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m bench.gpu"))
