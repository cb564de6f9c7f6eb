"""``make gpu VISIT=first``: a visit to this machine's GPU, that comes back with figures whatever fails on the way.

A visit is a list of pieces (``visit/pieces.py``), the most valuable first. Each runs in a process of its own and is
stopped when its time is over. A family of kernels whose trial crashes, hangs or is wrong is left out of all that
follows, by itself and by name. After each piece everything found so far is written into one archive, which
``make gpu-home`` unpacks. What a piece found stays: it is run again only when a file that it depends on has changed,
and its rows are kept even then. Each card has a folder of its own. Touches no network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastres.bench.visit.pieces import BUDGET, VISITS
from fastres.bench.visit.running import RESULTS
from fastres.errors import FastresError
from fastres.kernels.routing import tables

from .visit import state as states
from .visit.visit import Visit


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a visit; exit status 1 where a piece is not known to be good, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Visit this machine's GPU.")
    parser.add_argument("visit", nargs="?", choices=(*VISITS, "all"), default="first", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="where the archive goes (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("out/gpu"), help="a folder for each card (%(default)s)")
    parser.add_argument("--budget", type=float, metavar="S", help=f"seconds (default {BUDGET}; all: no limit)")
    parser.add_argument("--only", nargs="+", default=(), metavar="PIECE", help="run these, also if they are known")
    parser.add_argument("--again", action="store_true", help="run also what is known already")
    parser.add_argument("--dry", action="store_true", help="say what would be run and for how long; needs no GPU")
    parser.add_argument("--rehearse", action="store_true", help="all of it on a pretended GPU, with injected faults")
    options = parser.parse_args(arguments)
    if options.rehearse:
        from fastres.bench.visit.rehearsal import rehearse

        return rehearse(options.out)
    if not torch.cuda.is_available() and not options.dry:
        print("fastres: make gpu needs a CUDA GPU, and torch finds none here", file=sys.stderr)
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
    sys.exit(main())
