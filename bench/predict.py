"""``python -m fastres.bench.predict``: what the roofline says before anything is measured.

Prints, for a model and a batch on a GPU of given ceilings, the arithmetic, the memory traffic and the least time of
each part of the network at one kernel a step, and the images a second that this allows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from fastres.architectures import get_architecture
from fastres.ceilings import Ceilings
from fastres.folding import outline
from fastres.plan import StepCost
from fastres.text import text_table

from .roofline import roofline


def parts(costs: Sequence[StepCost]) -> dict[str, list[StepCost]]:
    """Costs by part of the network: stem, layer1, …, head."""
    found: dict[str, list[StepCost]] = {}
    for cost in costs:
        found.setdefault(cost.name.split(".")[0], []).append(cost)
    return found


def prediction(model: str, batch: int, size: int, dtype: torch.dtype, ceilings: Ceilings) -> str:
    """The table as text."""
    plan = outline(get_architecture(model), dtype)
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
    title = f"{model}, batch {batch}, {size}×{size}, {str(dtype).removeprefix('torch.')}: "
    title += f"at {ceilings.tflops:g} TFLOP/s and {ceilings.gb_per_s:g} GB/s"
    return f"{title}\n{text_table(rows, right=range(1, 5))}\nroofline: {rate:,.0f} images/s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the prediction for each batch."""
    parser = argparse.ArgumentParser(
        prog="python -m fastres.bench.predict", description="Roofline of a model on a GPU."
    )
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--tflops", type=float, default=790, help="matmul rate, 10¹² FLOP/s (default: %(default)s)")
    parser.add_argument("--gb-per-s", type=float, default=4300, help="copy rate, read + written (default: %(default)s)")
    options = parser.parse_args(arguments)
    for batch in options.batch:
        limits = Ceilings(options.tflops, options.gb_per_s)
        print(prediction(options.model, batch, options.size, getattr(torch, options.dtype), limits))
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
