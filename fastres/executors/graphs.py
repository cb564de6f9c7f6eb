"""CUDA graphs: a warm call replays one captured graph instead of launching some fifty kernels from Python.

The first call with a shape runs plainly, which compiles and loads its kernels; the second is captured; later ones copy
the input into the graph's own, replay it and copy the outputs out, so that what a caller gets is the caller's memory.
All of them run on a batch of the graph's size and layout: what a call returns does not depend on how many came before.

**Which calls.** Python takes 19 to 42 µs to launch a kernel (measured, without the driver), 54 of which are a
ResNet-50: about 2.4 ms, where 64 images keep an H100 busy for some 1.6 ms (estimated). So calls of up to 256 images of
224×224 replay, of whatever dtype; above, launching is hidden behind the GPU's work, and copying would only add to it.

**Sizes share graphs.** Up to 16 images each size has its own. From 17 to 64 sizes go up to the next multiple of 4: the
rows that are lacking cost at most 3 in 20 of the GPU's time, less than launching does, and 28 graphs serve every batch
from 1 to 64. Above, a size has its own again. Images do not affect one another, so the rows filled up may hold
anything; callers get their own.

Graphs are kept for the shapes used last. They share one memory pool and therefore run one after the other: each call
waits, on its own stream, for the one before.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastres.errors import GraphMemoryWarning
from fastres.kernels.launch import cdiv, device_guard, float32_precision
from fastres.network.plan import LOGITS

from .recent import Recent

# Batches of 1 to 64 take 28 graphs for one dtype and choice of outputs.
GRAPHS_KEPT = 48

# Pixels of all images of a call. More run plainly.
LARGEST = 256 * 224 * 224
# Of the inputs of all graphs that are kept, which are memory of their own: 1.2 GB in float32.
PIXELS_KEPT = 8 * LARGEST

EXACT, STEP, LARGEST_SHARED = 16, 4, 64

# Shapes that have run once. A note is a few hundred bytes.
FIRST_CALLS_KEPT = 1024


def images_run(batch: int) -> int:
    """The number of images that a graph for ``batch`` images runs."""
    return cdiv(batch, STEP) * STEP if EXACT < batch <= LARGEST_SHARED else batch


def pixels(shape: Sequence[int]) -> int:
    """The pixels of all images of a batch ``[N, 3, H, W]``."""
    n, _, h, w = shape
    return n * h * w


class Runner(Protocol):
    """What runs a plan: :class:`fastres.executors.gpu.GpuExecutor`."""

    def run(self, x: Tensor, outputs: Sequence[str] = (LOGITS,)) -> list[Tensor]: ...


class Replayable(Protocol):
    """A captured piece of work: ``torch.cuda.CUDAGraph``."""

    def replay(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Captured:
    """A graph with the memory that it reads and writes: rows for as many images as it runs, or more than a call has."""

    graph: Replayable
    source: Tensor
    outputs: list[Tensor]

    def __call__(self, x: Tensor) -> list[Tensor]:
        n = x.shape[0]
        self.source[:n].copy_(x)
        self.graph.replay()
        return [output[:n].clone() for output in self.outputs]


class Pool:
    """Captures graphs into one pool of a device's memory, and orders their use across streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with device_guard(device):
            self._handle = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)
            self._done = torch.cuda.Event()

    def capture(self, runner: Runner, shape: Sequence[int], dtype: torch.dtype, outputs: Sequence[str]) -> Captured:
        """Capture ``runner.run`` on a batch of ``shape`` and ``dtype``.

        Raises ``torch.OutOfMemoryError`` where there is no memory for it, and what ``runner.run`` raises; the current
        stream and torch's allocator are then as they were.
        """
        # Whatever mode the caller is in: later callers, in other modes, write to this memory.
        with torch.inference_mode(False), torch.no_grad():
            # A module that is loaded during a capture breaks it. This run loads what the capture launches.
            runner.run(torch.zeros(tuple(shape), dtype=dtype, device=self._device), outputs)
            graph = torch.cuda.CUDAGraph()
            with self._capturing(graph):
                # From the pool, where memory goes back to no other stream when the graph is forgotten.
                source = torch.empty(tuple(shape), dtype=dtype, device=self._device)
                results = runner.run(source, outputs)
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._done)  # the memory may be one that another graph still works in
            source.zero_()
            self._done.record(stream)
        return Captured(graph, source, results)

    @contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Work within goes into ``graph``."""
        stream = torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(graph, pool=self._handle, stream=self._stream, capture_error_mode="thread_local"):
                yield
        except BaseException:
            # Where CUDA itself ended the capture, torch leaves its own context half-way.
            torch.cuda.set_stream(stream)
            with suppress(AttributeError, RuntimeError):  # torch has no such function, or has done it
                torch._C._cuda_endAllocateToPool(self._device.index, self._handle)
            raise

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
        self._captured: Recent[tuple[Any, ...], Captured] = Recent(kept)
        self._called: Recent[tuple[Any, ...], None] = Recent(FIRST_CALLS_KEPT)
        self._too_large: Recent[tuple[Any, ...], None] = Recent(FIRST_CALLS_KEPT)  # for the memory that there was
        self._lock = threading.Lock()

    def run(self, x: Tensor, outputs: Sequence[str] = (LOGITS,)) -> list[Tensor]:
        """As :meth:`fastres.executors.gpu.GpuExecutor.run`."""
        if pixels(x.shape) > LARGEST or self._pool.is_capturing():
            return self.runner.run(x, outputs)
        shape = (images_run(x.shape[0]), *x.shape[1:])
        key = (shape, x.dtype, tuple(outputs), float32_precision())
        with self._lock, device_guard(x.device):
            captured = self._captured.get(key)
            if captured is None and key in self._called and key not in self._too_large:
                captured = self._capture(key)
            if captured is None:
                self._called.keep(key, None)
                return self._plainly(x, shape, outputs)
            self._captured.keep(key, captured)
            results: list[Tensor] = self._pool.replay(captured, x)
            return results

    def _plainly(self, x: Tensor, shape: tuple[int, ...], outputs: Sequence[str]) -> list[Tensor]:
        """Run on a batch like a graph's: ``x`` with rows of zeros up to ``shape``."""
        n = x.shape[0]
        if n == shape[0]:
            return self.runner.run(x.contiguous(), outputs)
        padded = torch.zeros(shape, dtype=x.dtype, device=x.device)
        padded[:n].copy_(x)
        return [result[:n].clone() for result in self.runner.run(padded, outputs)]

    def _capture(self, key: tuple[Any, ...]) -> Captured | None:
        """A graph for ``key``, in place of graphs unused for longest; None where there is no memory for it."""
        shape, dtype, outputs, _ = key
        try:
            captured: Captured = self._pool.capture(self.runner, shape, dtype, outputs)
        except torch.OutOfMemoryError:
            if not self._too_large:
                warnings.warn(
                    f"No GPU memory is left to capture a CUDA graph for a batch of shape {list(shape)}: batches for "
                    "which that is so run without one, with the same results, small ones more slowly. This is said "
                    "once for a model",
                    GraphMemoryWarning,
                    stacklevel=2,
                )
            self._too_large.keep(key, None)
            return None
        self._called.pop(key, None)
        self._captured.keep(key, captured)
        while sum(pixels(kept[0]) for kept in self._captured) > PIXELS_KEPT:
            self._captured.popitem(last=False)
        return captured
