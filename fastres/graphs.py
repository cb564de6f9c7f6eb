"""CUDA graphs: a warm call replays one captured graph instead of launching some fifty kernels from Python.

The first call with a shape runs eagerly, which compiles and loads its kernels; the second is captured; later ones copy
the input into the graph's own, replay it and copy the outputs out, so that what a caller gets is the caller's memory.
Graphs are kept for the shapes used last. They share one memory pool and therefore run one after the other: each call
waits, on its own stream, for the one before. Batches so large that launching costs nothing run eagerly.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .kernels.launch import device_guard, float32_precision
from .plan import LOGITS
from .recent import Recent

GRAPHS_KEPT = 16

# Above this many bytes of input the GPU works for longer than Python needs to launch: 32 float16 images of 224×224
# take an H100 at least 0.7 ms at its roofline, and copying them into the graph would only add to that.
LARGEST_INPUT = 32 * 3 * 224 * 224 * 2


class Runner(Protocol):
    """What runs a plan: :class:`fastres.gpu.GpuExecutor`."""

    def run(self, x: Tensor, outputs: Sequence[str] = (LOGITS,)) -> list[Tensor]: ...


class Replayable(Protocol):
    """A captured piece of work: ``torch.cuda.CUDAGraph``."""

    def replay(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Captured:
    """A graph with the memory that it reads and writes."""

    graph: Replayable
    source: Tensor
    outputs: list[Tensor]

    def __call__(self, x: Tensor) -> list[Tensor]:
        self.source.copy_(x)
        self.graph.replay()
        return [output.clone() for output in self.outputs]


class Pool:
    """Captures graphs into one pool of a device's memory, and orders their use across streams."""

    def __init__(self, device: torch.device) -> None:
        with device_guard(device):
            self._handle = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)
            self._done = torch.cuda.Event()

    def capture(self, runner: Runner, x: Tensor, outputs: Sequence[str]) -> Captured:
        """Capture ``runner.run`` on an input like ``x``; the kernels must have run before."""
        source = torch.empty_like(x).copy_(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._handle, stream=self._stream, capture_error_mode="thread_local"):
            results = runner.run(source, outputs)
        return Captured(graph, source, results)

    def replay(self, captured: Captured, x: Tensor) -> list[Tensor]:
        """Replay on the current stream, after whatever used the pool last."""
        stream = torch.cuda.current_stream(x.device)
        stream.wait_event(self._done)
        results = captured(x)
        self._done.record(stream)
        return results

    @staticmethod
    def is_capturing() -> bool:
        """Whether the caller is capturing a graph of its own, which takes plain launches."""
        return torch.cuda.is_current_stream_capturing()


class GraphExecutor:
    """Runs ``runner`` through CUDA graphs where that is faster. ``pool`` is a :class:`Pool` (or a test's)."""

    def __init__(self, runner: Runner, pool: Any, kept: int = GRAPHS_KEPT) -> None:
        self.runner = runner
        self._pool = pool
        self._captured: Recent[tuple[Any, ...], Captured | None] = Recent(kept)  # None: has run once
        self._lock = threading.Lock()

    def run(self, x: Tensor, outputs: Sequence[str] = (LOGITS,)) -> list[Tensor]:
        """As :meth:`fastres.gpu.GpuExecutor.run`."""
        if x.nbytes > LARGEST_INPUT or self._pool.is_capturing():
            return self.runner.run(x, outputs)
        key = (x.shape, x.dtype, tuple(outputs), float32_precision())
        with self._lock, device_guard(x.device):
            if key not in self._captured:
                self._captured.keep(key, None)
                return self.runner.run(x, outputs)
            captured = self._captured[key]
            if captured is None:
                captured = self._pool.capture(self.runner, x, outputs)
            self._captured.keep(key, captured)
            results: list[Tensor] = self._pool.replay(captured, x)
            return results
