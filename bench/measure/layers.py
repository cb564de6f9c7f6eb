"""The time of each step of fastres, and the shortest time that the ceilings allow.

A step's time is the median over runs of the whole network, so that the caches hold its input as in real use. On a GPU,
CUDA events enclose each step. A spin kernel first holds the GPU until all launches are queued, so that the GPU never
waits for a launch. An event itself takes about a microsecond, which matters for steps of a few microseconds. If a step
runs several times in a call, on a few images each, its times are summed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastres.bench.report.results import LayerRow, significant
from fastres.errors import FastresError
from fastres.model.derived import make_executor
from fastres.model.explain import ExplainedStep
from fastres.model.model import Model
from fastres.network.plan import Step
from fastres.roofline.ceilings import Ceilings
from fastres.text import dtype_name

WARMUPS, ROUNDS = 2, 15
SECONDS = 4.0  # time limit for the rounds, after at least FEWEST of them
FEWEST = 3
SPIN_CYCLES = 100_000_000  # 50 ms at 2 GHz: longer than Python needs to launch a network's kernels

Stamp = tuple[str, int, Any, Any]  # step, images in this call, begin, end
# For each step, in execution order: the images of each call, and the total microseconds of all calls.
Times = dict[str, tuple[list[int], float]]


def measure(model: Model, x: Tensor, ceilings: Ceilings) -> tuple[LayerRow, ...]:
    """Return a row for each step that ``model(x)`` runs, in order.

    Raise ``FastresError`` for a step that ``model.explain()`` does not have.
    """
    rounds = step_times(model, x)
    calls = {name: images for name, (images, _) in rounds[0].items()}
    times = {name: statistics.median(found[name][1] for found in rounds) for name in calls}
    n, _, h, w = x.shape
    explained = {
        images: {row.step: row for row in model.explain(images, (h, w), ceilings=ceilings)}
        for images in sorted({count for counts in calls.values() for count in counts})
    }
    rows = []
    for name, counts in calls.items():
        missing = [images for images in counts if name not in explained[images]]
        if missing:
            raise FastresError(f"{name} ran on {missing[0]} images, but model.explain() does not list it")
        rows.append(_row(model, (n, h), [explained[images][name] for images in counts], times[name]))
    return tuple(rows)


def _row(model: Model, setting: tuple[int, int], parts: list[ExplainedStep], us: float) -> LayerRow:
    """Return the row of one step. ``parts`` are its calls, which differ only in the number of images."""
    first = parts[0]
    least = sum(part.roofline_us or 0.0 for part in parts)
    batch, size = setting
    return LayerRow(
        model.architecture.name,
        size,
        batch,
        dtype_name(model.dtype),
        first.step,
        first.op,
        first.kernel,
        first.config,
        significant(us),
        sum(part.flops for part in parts),
        sum(part.bytes for part in parts),
        first.bound,
        significant(least),
        significant(least / us),
    )


@torch.inference_mode()
def step_times(model: Model, x: Tensor) -> list[Times]:
    """Return the times of every step, for each of several runs of ``model`` on ``x``."""
    executor: Any = make_executor(model.plan, model.device)
    executor = getattr(executor, "runner", executor)  # bypasses CUDA graphs, which replay all steps at once
    stamps: list[Stamp] = []
    mark = _event if x.is_cuda else time.perf_counter
    rounds: list[Times] = []
    with stamped(executor, stamps, mark):
        start = time.perf_counter()
        for turn in range(WARMUPS + ROUNDS):
            stamps.clear()
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
                torch.cuda._sleep(SPIN_CYCLES)
            executor.run(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            if turn >= WARMUPS:
                rounds.append(_summed(stamps))
            if len(rounds) >= FEWEST and time.perf_counter() - start > SECONDS:
                break
    return rounds


@contextmanager
def stamped(executor: Any, stamps: list[Stamp], mark: Callable[[], Any]) -> Iterator[None]:
    """Within the context, record each step that ``executor`` runs: its name, images, and a mark before and after."""
    if getattr(executor, "direct", None) is not None:

        def observed(step: Step, images: int, run: Callable[[], None]) -> None:
            begin = mark()
            run()
            stamps.append((step.name, images, begin, mark()))

        executor.direct.observe = observed
        try:
            yield
        finally:
            executor.direct.observe = None
        return
    run_step = executor.run_step

    def timed(step: Step, values: dict[str, Tensor], *rest: Any) -> None:
        images, begin = values[step.input].shape[0], mark()
        run_step(step, values, *rest)
        stamps.append((step.name, images, begin, mark()))

    executor.run_step = timed
    try:
        yield
    finally:
        del executor.run_step


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _summed(stamps: list[Stamp]) -> Times:
    times: Times = {}
    for name, images, begin, end in stamps:
        us = 1e6 * (end - begin) if isinstance(begin, float) else 1e3 * begin.elapsed_time(end)
        before, sum_us = times.get(name, ([], 0.0))
        times[name] = ([*before, images], sum_us + us)
    return times
