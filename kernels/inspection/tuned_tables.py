"""Compile every configuration of the tuned tables, without a GPU: ``python -m fastres.kernels.inspection_tables``.

The GPU of a table does not have to be in this machine. The command compiles each kernel of the table for that GPU's
architecture and checks four things: the kernel fits, does not spill in its main loop, multiplies on the tensor cores,
and writes to shared memory or registers only after all reads of the old contents.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from fastres.kernels.routing.cards import CARDS, Gpu, card
from fastres.kernels.routing.rules import ConvConfig
from fastres.kernels.routing.tables import FOLDER, Block, Layer, Tuned, TunedBlock, read_table
from fastres.program import run_program
from fastres.text import text_table

from .ahead_of_time import Compilation
from .parallel import in_processes
from .pointer_kernels import compile_conv, inspect
from .tma_kernels import compile_block, compile_tma, inspect_tma


@dataclass(frozen=True)
class Entry:
    """One configuration of a table, and the GPU to compile it for: the table's or one of the same architecture."""

    gpu: Gpu
    layer: Layer | Block
    config: ConvConfig


@dataclass(frozen=True)
class Verdict:
    """The result of compiling an entry; ``problem`` is empty if it is good."""

    entry: Entry
    registers: int
    shared_memory: int
    problem: str


def entries(path: Path) -> list[Entry]:
    """Return the distinct compilations of a table. Most batch sizes that share a configuration share a kernel."""
    found = read_table(path)
    table = found.table
    gpu = next((gpu for gpu in CARDS if (gpu.name, gpu.arch) == (found.gpu, found.arch)), None)
    gpu = gpu or card(found.arch)
    tuned: list[Tuned | TunedBlock] = [*table.layers, *table.blocks]
    made = [Entry(gpu, entry.layer, entry.config) for entry in tuned]
    return list({(entry.layer.without_batch, compilation(entry)): entry for entry in made}.values())


def compilation(entry: Entry) -> Compilation:
    """Return the compilation of an entry."""
    layer, config = entry.layer, entry.config
    if isinstance(layer, Block):
        return compile_block(layer, config)
    compiled = compile_conv if config.kernel == "conv" else compile_tma
    settings: dict[str, Any] = {"residual": layer.residual, "relu": layer.relu, "out": layer.out_dtype}
    return compiled(layer.shape, getattr(torch, layer.dtype), config, **settings)


def judge(entry: Entry) -> Verdict:
    """Compile one entry and look for problems."""
    item = compilation(entry)
    if item.kernel == "conv":
        report = inspect(item, entry.gpu)
        problems = report.problems
    else:
        tma = inspect_tma(item, entry.gpu)
        report, problems = tma.report, tma.problems
    return Verdict(entry, report.registers, report.shared_memory, ", ".join(problems))


def compiles_well(entry: Entry) -> bool:
    """Return True if an entry compiles and :func:`judge` finds no problem."""
    try:
        return not judge(entry).problem
    except (RuntimeError, triton.CompilationError):
        return False


def compiling_well(pool: Executor, gpu: Gpu, layer: Layer | Block, configs: Sequence[ConvConfig]) -> list[ConvConfig]:
    """Return those of ``configs`` that compile well for ``layer`` on ``gpu``, compiled in ``pool``."""
    good = pool.map(compiles_well, [Entry(gpu, layer, config) for config in configs])
    return [config for config, is_good in zip(configs, good, strict=True) if is_good]


def judge_all(todo: Sequence[Entry], workers: int | None = None) -> list[Verdict]:
    """Compile in parallel, with a progress bar."""
    return in_processes(judge, todo, workers=workers, label="compile")


def rows(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """Return a header and one row per entry."""
    lines: list[tuple[str, ...]] = [("layer", "kernel", "configuration", "registers", "shared KiB", "verdict")]
    for verdict in verdicts:
        layer, config = verdict.entry.layer, verdict.entry.config
        shape = layer.shape
        name = f"{shape.P}×{shape.Q} {shape.R}×{shape.S}/{shape.stride} {shape.C}→{shape.K}"
        if isinstance(layer, Block):
            name += f" joined →{layer.channels}" + f"→{layer.next_channels}" * bool(layer.next_channels)
        numbers = (str(verdict.registers), f"{verdict.shared_memory / 1024:.1f}")
        lines.append((name, config.kernel, str(config), *numbers, verdict.problem or "good"))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one row per configuration; return 1 if one is not good, else 0."""
    parser = argparse.ArgumentParser(prog="python -m fastres.kernels.inspection_tables", description=__doc__)
    parser.add_argument("tables", type=Path, nargs="*", help="tables (default: all in the package)")
    options = parser.parse_args(arguments)
    paths = options.tables or sorted(FOLDER.glob("*/conv.json"))
    if not paths:
        print(f"There is no table of tuned configurations in {FOLDER} yet; write one with fastres.bench.tune")
        return 0
    bad = 0
    for path in paths:
        verdicts = judge_all(entries(path))
        bad += sum(bool(verdict.problem) for verdict in verdicts)
        print(f"{path.parent.name}\n{text_table(rows(verdicts), right=(3, 4))}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m fastres.kernels.inspection_tables"))
