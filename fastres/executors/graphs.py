"""CUDA graphs: a warm call replays one captured graph instead of launching some fifty kernels from Python.

The first call with a shape runs without a graph, which compiles and loads its kernels. The second call is captured.
Later calls copy the input into the graph's memory, replay the graph and copy the outputs into new memory for the
caller. All calls run on a batch of the graph's size and layout, so a result does not depend on the number of earlier
calls.

**Which calls.** Python takes 19 to 42 µs to launch a kernel (measured, without the driver). A ResNet-50 has 54 kernels,
so launching takes about 2.4 ms, while 64 images keep an H100 busy for some 1.6 ms (estimated). So calls of up to 256
images of 224×224, in any dtype, replay a graph. For larger calls the GPU's work hides the launches, and the copies
would only add time.

**Sizes share graphs.** Up to 16 images, each batch size has its own graph. From 17 to 64, sizes are rounded up to the
next multiple of 4. The extra rows cost at most 3 in 20 of the GPU's time, less than launching does, and 28 graphs serve
every batch from 1 to 64. Above 64, each size has its own graph again. Images do not affect one another, so the extra
rows may hold anything; callers get only their own rows.

Graphs are kept for the most recently used shapes. They share one memory pool, so they run one after the other: each
call waits, on its own stream, for the previous one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastres.errors import GraphMemoryWarning
from fastres.forks import Guard
from fastres.kernels.launch import cdiv, device_guard, float32_precision
from fastres.network.plan import LOGITS
from fastres.terminal import warn

from .recent import Recent

# Batches of 1 to 64 take 28 graphs for one dtype and choice of outputs.
GRAPHS_KEPT = 48

# The most pixels, over all images of a call, that replay a graph. Larger calls run without one.
LARGEST = 256 * 224 * 224
# The most pixels in the inputs of all kept graphs, which have their own memory: 1.2 GB in float32.
PIXELS_KEPT = 8 * LARGEST

EXACT, STEP, LARGEST_SHARED = 16, 4, 64

# Number of shapes remembered as having run once. An entry is a few hundred bytes.
FIRST_CALLS_KEPT = 1024


def images_run(batch: int) -> int:
    """Return the number of images in the graph that serves ``batch`` images."""
    return cdiv(batch, STEP) * STEP if EXACT < batch <= LARGEST_SHARED else batch


def pixels(shape: Sequence[int]) -> int:
    """Return the pixels of all images of a batch ``[N, 3, H, W]``."""
    n, _, h, w = shape
    return n * h * w


class Runner(Protocol):
    """Runs a plan: :class:`fastres.executors.gpu.GpuExecutor`."""

    def run(self, x: Tensor, outputs: Sequence[str] = (LOGITS,)) -> list[Tensor]: ...


class Replayable(Protocol):
    """A captured graph: ``torch.cuda.CUDAGraph``."""

    def replay(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Captured:
    """A graph with the memory that it reads and writes, which may have rows for more images than a call has."""

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

        Raises ``torch.OutOfMemoryError`` if there is not enough memory, and the errors of ``runner.run``. After an
        error the current stream and torch's allocator are as before.
        """
        # Do not use the caller's inference mode: later callers, in other modes, write to this memory.
        with torch.inference_mode(False), torch.no_grad():
            # Loading a module during a capture breaks the capture. This run loads all that the capture launches.
            runner.run(torch.zeros(tuple(shape), dtype=dtype, device=self._device), outputs)
            graph = torch.cuda.CUDAGraph()
            with self._capturing(graph):
                # Taken from the pool, so that no other stream gets this memory when the graph is dropped.
                source = torch.empty(tuple(shape), dtype=dtype, device=self._device)
                results = runner.run(source, outputs)
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._done)  # another graph may still be using this memory
            source.zero_()
            self._done.record(stream)
        return Captured(graph, source, results)

    @contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Capture the work inside the ``with`` block into ``graph``."""
        stream = torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(graph, pool=self._handle, stream=self._stream, capture_error_mode="thread_local"):
                yield
        except BaseException:
            # If CUDA itself ended the capture, torch leaves its own context incomplete.
            torch.cuda.set_stream(stream)
            with suppress(AttributeError, RuntimeError):  # torch has no such function, or has already called it
                torch._C._cuda_endAllocateToPool(self._device.index, self._handle)
            raise

    def replay(self, captured: Captured, x: Tensor) -> list[Tensor]:
        """Replay on the current stream, after the last use of the pool."""
        stream = torch.cuda.current_stream(x.device)
        stream.wait_event(self._done)
        results = captured(x)
        self._done.record(stream)
        return results

    @staticmethod
    def is_capturing() -> bool:
        """Return True if the caller is capturing its own graph, which needs plain launches."""
        return torch.cuda.is_current_stream_capturing()


class GraphExecutor:
    """Runs ``runner`` through CUDA graphs if that is faster. ``pool`` is a :class:`Pool` or a replacement in tests."""

    def __init__(self, runner: Runner, pool: Any, kept: int = GRAPHS_KEPT) -> None:
        self.runner = runner
        self._pool = pool
        self._captured: Recent[tuple[Any, ...], Captured] = Recent(kept)
        self._called: Recent[tuple[Any, ...], None] = Recent(FIRST_CALLS_KEPT)
        self._too_large: Recent[tuple[Any, ...], None] = Recent(FIRST_CALLS_KEPT)  # shapes that did not fit into memory
        self._guard = Guard()

    def run(self, x: Tensor, outputs: Sequence[str] = (LOGITS,)) -> list[Tensor]:
        """Run like :meth:`fastres.executors.gpu.GpuExecutor.run`."""
        if pixels(x.shape) > LARGEST or self._pool.is_capturing():
            return self.runner.run(x, outputs)
        shape = (images_run(x.shape[0]), *x.shape[1:])
        key = (shape, x.dtype, tuple(outputs), float32_precision())
        with self._guard, device_guard(x.device):
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
        """Run without a graph, on a batch of the graph's ``shape``: ``x`` padded with rows of zeros."""
        n = x.shape[0]
        if n == shape[0]:
            return self.runner.run(x.contiguous(), outputs)
        padded = torch.zeros(shape, dtype=x.dtype, device=x.device)
        padded[:n].copy_(x)
        return [result[:n].clone() for result in self.runner.run(padded, outputs)]

    def _capture(self, key: tuple[Any, ...]) -> Captured | None:
        """Capture a graph for ``key`` and drop the least recently used. Return None if memory runs out."""
        shape, dtype, outputs, _ = key
        try:
            captured: Captured = self._pool.capture(self.runner, shape, dtype, outputs)
        except torch.OutOfMemoryError:
            if not self._too_large:
                warn(
                    f"No GPU memory is left to capture a CUDA graph for a batch of shape {list(shape)}. Batches of "
                    "this size run without a graph: the results are the same, but small batches are slower. To use "
                    "graphs, free GPU memory and load the model again. This warning is shown once per model",
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
