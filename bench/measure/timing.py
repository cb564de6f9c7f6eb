"""Measure the time and memory of engines: first calls, then interleaved calls.

Engines of one setting are timed in turn in one process, in a new random order each round. Clock drift and other
programs then affect all of them equally. On a CPU, the threads of an engine wait busily for some milliseconds after a
call, and slow down whatever comes next. A short call is therefore made twice, and the second counts.
"""

from __future__ import annotations

import ctypes
import gc
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Call = Callable[[], object]
T = TypeVar("T")

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MOST_LAUNCHES, REPLAYS = 20, 15  # launches of a kernel in a graph, replays of the graph

_RESET_PEAK = "5"  # proc(5): writing 5 resets the peak resident set size to the current one


@dataclass(frozen=True)
class Budget:
    """How long to time one setting: about ``seconds``, in ``fewest`` to ``most`` rounds, after ``warmups``."""

    seconds: float
    fewest: int
    most: int
    warmups: int

    def rounds(self, seconds_a_round: float) -> int:
        return max(self.fewest, min(self.most, int(self.seconds / max(seconds_a_round, 1e-9))))


SETTLED_MS = 100.0  # a longer call hardly notices the threads of the one before

FULL = Budget(seconds=10, fewest=15, most=200, warmups=3)
QUICK = Budget(seconds=4, fewest=5, most=30, warmups=2)


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of the time of one call, in milliseconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Quantiles:
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(samples), fifths[3])


def elapsed_ms(call: Call, device: torch.device) -> float:
    """Return the milliseconds of one call that starts on an idle device.

    CUDA events measure it on a GPU, and the wall clock elsewhere. The events include the launches: if the host submits
    work slowly, the GPU's idle time counts.
    """
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def launch_microseconds(launch: Call) -> float:
    """Return the median time of one launch on the current GPU, in microseconds.

    The launch is replayed in a graph, because a launch from Python takes longer than many kernels. Data that fits in
    the L2 cache stays there, as the activations of a small batch do in real use.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    launch()
    once = min(elapsed_ms(launch, device) for _ in range(2))
    launches = max(1, min(MOST_LAUNCHES, int(1 / max(once, 1e-3))))  # about 1 ms per replay, or one launch
    graph = captured(launch, launches)
    graph.replay()
    return round(1e3 * statistics.median(elapsed_ms(graph.replay, device) for _ in range(REPLAYS)) / launches, 2)


def captured(launch: Call, launches: int) -> torch.cuda.CUDAGraph:
    """Return a graph of ``launches`` launches. One launch before the capture compiles the kernel.

    The graph does not keep the tensors that ``launch`` uses: keep ``launch`` for as long as you replay the graph.
    """
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(launches):
            launch()
    return graph


def interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    budget: Budget,
    progress: Callable[[float], object] = lambda share: None,
) -> dict[str, list[float]]:
    """Return the milliseconds of each call by name, after warm-ups. Each round times everything once.

    On a CPU, a call shorter than ``SETTLED_MS`` is made once more before it is timed. ``progress`` is called after each
    round with the share of rounds that are done.
    """
    if not calls:
        return {}
    order = list(calls)
    warm = [{name: elapsed_ms(calls[name], device) for name in order} for _ in range(budget.warmups)]
    least = {name: min(times[name] for times in warm) for name in order}
    twice = {name for name, ms in least.items() if device.type == "cpu" and ms < SETTLED_MS}
    rounds = budget.rounds(sum(ms * (2 if name in twice else 1) for name, ms in least.items()) / 1e3)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0).shuffle
    for turn in range(rounds):
        shuffle(order)
        for name in order:
            if name in twice:
                calls[name]()
            samples[name].append(elapsed_ms(calls[name], device))
        progress((turn + 1) / rounds)
    return samples


def measured(work: Callable[[], T], device: torch.device) -> tuple[T, float, float]:
    """Run ``work`` and return its result, its seconds, and the peak growth of memory in bytes."""
    gc.collect()
    memory = _GpuPeak(device) if device.type == "cuda" else _HostPeak()
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start, memory.growth()


class _GpuPeak:
    """The peak growth of the bytes that torch's allocator holds on ``device``."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.device = device
        self.before = torch.cuda.memory_allocated(device)

    def growth(self) -> float:
        return torch.cuda.max_memory_allocated(self.device) - self.before


class _HostPeak:
    """The peak growth of the process's resident bytes."""

    def __init__(self) -> None:
        _return_free_memory()
        self.resets = can_reset_peak()
        self.before = _status_bytes("VmRSS") if self.resets else _rusage_bytes()

    def growth(self) -> float:
        peak = _status_bytes("VmHWM") if self.resets else _rusage_bytes()
        return max(0, peak - self.before)


def memory_method(device: torch.device) -> str:
    """Return a description of how ``peak_memory_mb`` is measured on ``device``."""
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated during build and first call, minus the memory allocated before"
    if can_reset_peak():
        return "VmHWM (reset through /proc/self/clear_refs) during build and first call, minus VmRSS before"
    return (
        "growth of the process's ru_maxrss during build and first call; this system cannot reset the peak, so an "
        "engine that stays below an earlier engine's peak shows 0"
    )


def can_reset_peak() -> bool:
    """Reset the process's peak memory, and return True if the system allows it."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
        return "VmHWM" in _STATUS.read_text()
    except OSError:
        return False


def _status_bytes(key: str) -> int:
    """Return a size from ``/proc/self/status`` in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {key}")


def _rusage_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _return_free_memory() -> None:
    """Make glibc return freed memory, so that memory used by the next engine shows as growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
