"""Measure how long one warm call keeps the Python thread busy: ``python -m bench.host``.

On a GPU, a call with a few images replays a graph and returns before the GPU is done. The time that Python takes for it
limits how many calls per second one thread can make. Without a GPU, the graph is replaced by one that does nothing, so
that only fastres's own share remains: checks, lookup and locks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import fastres
from fastres.bench.report.results import write_whole
from fastres.commands.environment import environment
from fastres.executors.graphs import Captured, GraphExecutor
from fastres.program import run_program

CALLS, ROUNDS = 100, 30


class NoGraph:
    """A graph that does nothing."""

    def replay(self) -> None:
        pass


class NoPool:
    """A graph pool and a runner whose graphs do nothing and return one tensor."""

    def __init__(self, result: Tensor) -> None:
        self._result = result

    def run(self, x: Tensor, outputs: Sequence[str] = ()) -> list[Tensor]:
        return [self._result]

    def capture(self, runner: object, shape: Sequence[int], dtype: torch.dtype, outputs: Sequence[str]) -> Captured:
        return Captured(NoGraph(), torch.empty(0), [self._result])

    def replay(self, captured: Captured, x: Tensor) -> list[Tensor]:
        captured.graph.replay()
        return [self._result]

    def is_capturing(self) -> bool:
        return False


def microseconds(call: Callable[[], object], settle: Callable[[], object], calls: int = CALLS) -> float:
    """Return the median time of a call over rounds of ``calls``. ``settle`` waits for the work that calls queued."""
    rounds = []
    for _ in range(ROUNDS):
        settle()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - start) / calls)
    return round(1e6 * statistics.median(rounds), 2)


def measure(model: str = "resnet50", batch: int = 1) -> dict[str, object]:
    """Return the host time of a warm call of ``model`` in microseconds, and the environment of the measurement."""
    on_gpu = torch.cuda.is_available()
    network = fastres.load(model, None, device="cuda" if on_gpu else "cpu")
    x = torch.rand(batch, 3, 224, 224, device=network.device).to(network.dtype)
    if on_gpu:
        network.warmup(batch)
        found = microseconds(lambda: network(x), torch.cuda.synchronize)
    else:
        nothing = NoPool(torch.zeros(batch, network.num_classes))
        network._current().executor = GraphExecutor(nothing, nothing)
        found = microseconds(lambda: network(x), lambda: None)
    graph = "CUDA graph" if on_gpu else "no GPU: a graph that does nothing"
    return {"model": model, "batch": batch, "graph": graph, "host_us": found, "environment": environment()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the host time, and write it as JSON if ``--out`` is given."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description="Measure the host time of one warm call.")
    parser.add_argument("--model", default="resnet50", help="name of the model (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="batch size (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON to this file")
    options = parser.parse_args(arguments)
    found = measure(options.model, options.batch)
    if options.out:
        write_whole(options.out, json.dumps(found, indent=1).encode())
    print(f"{found['model']}, batch {found['batch']}: {found['host_us']} µs per call ({found['graph']})")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m bench.host"))
