"""``python -m bench.estimates``: print estimates and rooflines before anything is measured.

Prints estimates for a model on every known card, or on the given ones (``by_card.py``). ``--roofline`` prints a table
for a GPU with given ceilings: the arithmetic, the memory traffic and the least time of each part of the network, and
the images per second that this allows. It assumes one kernel per step, or joined convolutions with ``--joined``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import triton

import fastres
from fastres.bench.report.results import write_whole
from fastres.bench.tuning.blocks import candidates as block_candidates
from fastres.bench.tuning.configurations import candidates
from fastres.errors import FastresError
from fastres.executors.gpu import block_of, conv_shape
from fastres.folding.build import outline
from fastres.folding.fusion import join
from fastres.kernels.routing.cards import H100
from fastres.kernels.routing.tables import Layer
from fastres.network.architectures import get_architecture
from fastres.network.plan import Conv, Joined, Plan, StepCost, step_cost
from fastres.program import run_program
from fastres.roofline.bound import roofline
from fastres.roofline.ceilings import Ceilings
from fastres.roofline.estimate import conv_seconds
from fastres.text import dtype_name, text_table

from . import by_card


def parts(costs: Sequence[StepCost]) -> dict[str, list[StepCost]]:
    """Group costs by part of the network: stem, layer1, …, head."""
    found: dict[str, list[StepCost]] = {}
    for cost in costs:
        found.setdefault(cost.name.split(".")[0], []).append(cost)
    return found


def joined_plan(plan: Plan, batch: int, size: int, dtype: torch.dtype, ceilings: Ceilings) -> Plan:
    """Join every run that a kernel supports on a Hopper GPU and whose bound is lower when joined."""
    shapes = plan.shapes(batch, size, size)
    costs = {cost.name: cost for cost in plan.costs(batch, size, size, dtype)}

    def saves(run: Joined) -> float:
        block = block_of(run, shapes[run.input], dtype)
        if not block_candidates(block, H100):
            return 0.0
        apart, together = [costs[part.name] for part in run.parts], [step_cost(run, shapes, dtype)]
        return roofline(apart, ceilings).seconds - roofline(together, ceilings).seconds

    return join(plan, saves)


def tiles_seconds(plan: Plan, batch: int, size: int, dtype: torch.dtype, ceilings: Ceilings) -> float:
    """Return the seconds of the plan's convolutions with the tiles estimated best, including split reductions."""
    shapes, seconds = plan.shapes(batch, size, size), 0.0
    for step in plan:
        if isinstance(step, Conv):
            layer = Layer.of(conv_shape(step, shapes[step.input]), dtype, step.residual is not None)
            seconds += min(conv_seconds(layer, config, H100, ceilings) for config in candidates(layer, H100))
    return seconds


def roofline_table(
    model: str, batch: int, size: int, dtype: torch.dtype, ceilings: Ceilings, joined: bool = False
) -> str:
    """Return the roofline table as text. ``joined`` joins convolutions first (:func:`joined_plan`)."""
    plan = outline(get_architecture(model), dtype)
    if joined:
        plan = joined_plan(plan, batch, size, dtype, ceilings)
    costs = plan.costs(batch, size, size, dtype)
    rows = [("part", "GFLOP/image", "MB/image", "µs/batch", "bound by memory")]
    for name, members in [*parts(costs).items(), ("total", costs)]:
        bound = roofline(members, ceilings)
        rows.append(
            (
                name,
                f"{bound.flops / batch / 1e9:.3f}",
                f"{bound.bytes / batch / 1e6:.2f}",
                f"{bound.seconds * 1e6:.0f}",
                f"{bound.memory_seconds / bound.seconds:.0%}",
            )
        )
    rate = batch / roofline(costs, ceilings).seconds
    title = f"{model}, batch {batch}, {size}×{size}, {dtype_name(dtype)}: "
    title += f"at {ceilings.tflops:g} TFLOP/s and {ceilings.gb_per_s:g} GB/s, {len(plan)} kernels"
    lines = [title, text_table(rows, right=range(1, 5)), f"roofline: {rate:,.0f} images/s"]
    if not joined and dtype.itemsize == 2:
        tiles = tiles_seconds(plan, batch, size, dtype, ceilings)
        lines.append(f"convolutions with the tiles estimated best on {H100.multiprocessors} SMs: {tiles * 1e6:,.0f} µs")
    return "\n".join(lines)


def cards_table(options: argparse.Namespace) -> str:
    """Return the estimates for cards as text. With ``--out``, also write them as JSON, with and without the rules."""
    dtype = getattr(torch, options.dtype)
    found = {
        plain: [
            by_card.estimate_card(gpu, options.model, batch, options.size, dtype, plain)
            for gpu in by_card.named(options.card)
            for batch in options.batch
        ]
        for plain in ([True, False] if options.out else [options.plain])
    }
    if options.out:
        versions = {"fastres": fastres.__version__, "torch": torch.__version__, "triton": triton.__version__}
        rows = by_card.as_rows([row for rows in found.values() for row in rows])
        note = "estimated, not measured on a GPU"
        head = json.dumps({"note": note, "command": options.command, "versions": versions}, ensure_ascii=False)
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.out, f'{head[:-1]},\n "rows": [\n  {lines}\n ]}}\n'.encode())
    title = f"{options.model}, {options.size}×{options.size}, {options.dtype}: estimated, not measured on a GPU"
    return f"{title}\n{by_card.table(found[options.plain])}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the estimates. Return exit status 2 for an unknown card."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.estimates", description="Estimates and rooflines of a model on GPUs."
    )
    parser.add_argument("--model", default="resnet50", help="name of the model (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 256], help="batch sizes (default: 1 256)")
    parser.add_argument("--size", type=int, default=224, help="image height and width (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--card", nargs="+", default=[], metavar="NAME", help="names of known cards (default: all)")
    parser.add_argument("--plain", action="store_true", help="leave out split reductions, wide tiles and micro-batches")
    parser.add_argument("--out", type=Path, help="write the estimates, with and without the rules, to this JSON file")
    parser.add_argument("--roofline", action="store_true", help="print the roofline of each part of the network")
    parser.add_argument("--joined", action="store_true", help="print the roofline with joined convolutions")
    parser.add_argument("--tflops", type=float, default=790, help="matmul rate, 10¹² FLOP/s (default: %(default)s)")
    parser.add_argument("--gb-per-s", type=float, default=4300, help="copy rate, read + written (default: %(default)s)")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    options.command = shlex.join(["python", "-m", "bench.estimates", *given])
    if not options.roofline and not options.joined:
        try:
            print(cards_table(options))
        except FastresError as error:
            print(f"fastres: {error}", file=sys.stderr)
            return 2
        return 0
    for batch in options.batch:
        limits = Ceilings(options.tflops, options.gb_per_s)
        print(roofline_table(options.model, batch, options.size, getattr(torch, options.dtype), limits, options.joined))
        print()
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m bench.estimates"))
