"""Streams, events and graphs of a pretend GPU (``cuda.py``). They detect races and calls forbidden during a capture.

Work runs immediately, on the CPU, so a missing wait never changes a result. It is detected here instead. Every stream
has a vector clock, and every memory block remembers which streams wrote and read it last. An access that is not ordered
after those is recorded as a race. It is also a race if memory is freed while another stream may still use it.

A captured graph holds recorded work that has not run. A replay runs it on the same memory.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Clock = dict[int, int]  # a vector clock: stream → how much of its work is known to be done


def merge(clock: Clock, other: Clock) -> None:
    """Advance ``clock`` to at least the times of ``other``."""
    for stream, time in other.items():
        clock[stream] = max(clock.get(stream, 0), time)


@dataclass
class Block:
    """The last uses of a block of memory: times of the streams that wrote it, and of those that have read it since.

    ``stream`` is the stream that gets the memory when it is freed, or None if a graph keeps it. ``noted`` are the
    streams passed to ``record_stream``.
    """

    stream: Stream | None = None
    written: Clock = field(default_factory=dict)
    read: Clock = field(default_factory=dict)
    noted: set[int] = field(default_factory=set)


class CaptureError(RuntimeError):
    """The error that CUDA raises for work that is not allowed during a capture."""


@dataclass(eq=False)
class Timeline:
    """The streams of one pretend GPU and the work on them."""

    clock: Callable[[], float]  # in seconds
    log: list[str] = field(default_factory=list)  # calls, in order
    races: list[str] = field(default_factory=list)
    host: Clock = field(default_factory=dict)  # the work that the CPU has waited for
    blocks: dict[int, Block] = field(default_factory=dict)  # by the address of a storage
    captures: list[CUDAGraph] = field(default_factory=list)  # in progress
    pools_open: set[Any] = field(default_factory=set)  # memory pools that the allocator allocates from

    def __post_init__(self) -> None:
        self.numbers = itertools.count()
        self.lock = threading.RLock()
        self.default = Stream(self)
        self.threads = threading.local()

    @property
    def current(self) -> Stream:
        """This thread's current stream."""
        return getattr(self.threads, "stream", self.default)

    @current.setter
    def current(self, stream: Stream) -> None:
        self.threads.stream = stream

    @property
    def capturing(self) -> CUDAGraph | None:
        """The graph that captures the current stream, or None."""
        return self.current.graph

    def use(self, reads: Iterable[Tensor], writes: Iterable[Tensor], what: str) -> None:
        """Record that the current stream reads and writes these tensors, and record races."""
        with self.lock:
            stream = self.current
            merge(stream.clock, self.host)
            now = stream.tick()
            for tensors, writing in ((reads, False), (writes, True)):
                for tensor in tensors:
                    block = self.blocks.setdefault(tensor.untyped_storage().data_ptr(), Block())
                    earlier = (("written", block.written), *((("read", block.read),) if writing else ()))
                    for did, times in earlier:
                        for other, time in times.items():
                            if stream.clock.get(other, 0) < time:
                                verb = "writes" if writing else "reads"
                                shape = list(tensor.shape)
                                self.races.append(
                                    f"{what} {verb} {shape} on stream {stream.number}, {did} on stream {other}"
                                )
                    if writing:
                        block.written, block.read = {stream.number: now}, {}
                    else:
                        block.read[stream.number] = now

    def freed(self, address: int) -> None:
        """Return the block's memory to its stream. Record a race if another stream may still use it."""
        with self.lock:
            block = self.blocks.pop(address, None)
            if block is None or block.stream is None:
                return
            done = dict(self.host)
            merge(done, block.stream.clock)
            for times in (block.written, block.read):
                for other, time in times.items():
                    if other not in block.noted and done.get(other, 0) < time:
                        self.races.append(f"memory of stream {block.stream.number} is freed, in use on stream {other}")

    def host_waits(self, what: str, stream: Stream | None = None) -> None:
        """Make the CPU wait for a stream, or for all if ``None``. Raise ``CaptureError`` during a capture."""
        self.forbid_in_capture(what)
        with self.lock:
            self.log.append(what)
            if stream is not None:
                merge(self.host, stream.clock)
            else:
                merge(self.host, self.everything)

    @property
    def everything(self) -> Clock:
        """The clock of all work that any stream was ever given."""
        return self.__dict__.setdefault("_everything", {})

    def forbid_in_capture(self, what: str) -> None:
        """Raise ``CaptureError`` if ``what`` breaks a capture in progress. The graph is then unusable."""
        for graph in self.captures:
            if graph.mode == "global" or (graph.mode == "thread_local" and graph.thread == threading.get_ident()):
                graph.broken = True
                raise CaptureError(f"CUDA error: operation not permitted when stream is capturing: {what}")


class Stream:
    """Replaces ``torch.cuda.Stream``."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline, self.number = timeline, next(timeline.numbers)
        self.clock: Clock = {}
        self.graph: CUDAGraph | None = None
        self.cuda_stream = self.number
        self.device = torch.device("cuda", 0)

    def __repr__(self) -> str:
        return f"<pretend stream {self.number}>"

    def tick(self) -> int:
        now = self.clock.get(self.number, 0) + 1
        self.clock[self.number] = self.timeline.everything[self.number] = now
        return now

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.timeline)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.timeline.log.append("wait_event")
        if event.graph is not self.graph and event.recorded:
            graph = self.graph or event.graph
            assert graph is not None
            graph.broken = True
            raise CaptureError("CUDA error: dependency created on uncaptured work in another stream")
        merge(self.clock, event.clock)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.timeline.host_waits("stream.synchronize", self)

    def query(self) -> bool:
        self.timeline.forbid_in_capture("stream.query")
        return True


class Event:
    """Replaces ``torch.cuda.Event``."""

    def __init__(self, timeline: Timeline, enable_timing: bool = False) -> None:
        self.timeline, self.timed = timeline, enable_timing
        self.clock: Clock = {}
        self.graph: CUDAGraph | None = None
        self.time: float | None = None

    @property
    def recorded(self) -> bool:
        return self.time is not None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.timeline.current
        self.timeline.log.append("event.record")
        merge(stream.clock, self.timeline.host)
        self.clock, self.graph, self.time = dict(stream.clock), stream.graph, self.timeline.clock()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.timeline.current).wait_event(self)

    def synchronize(self) -> None:
        self.timeline.forbid_in_capture("event.synchronize")
        self.timeline.log.append("event.synchronize")
        merge(self.timeline.host, self.clock)

    def query(self) -> bool:
        self.timeline.forbid_in_capture("event.query")
        return True

    def elapsed_time(self, end: Event) -> float:
        if not (self.timed and end.timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.time is None or end.time is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return (end.time - self.time) * 1e3


class CUDAGraph:
    """Replaces ``torch.cuda.CUDAGraph``. It works with torch's own ``torch.cuda.graph``."""

    def __init__(self, timeline: Timeline, keep_graph: bool = False) -> None:
        self.timeline = timeline
        self.work: list[Callable[[], None]] = []
        self.memory: list[Tensor] = []  # that the graph keeps alive
        self.broken = self.captured = False
        self.mode, self.thread = "global", 0
        self.handle: Any = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        stream = self.timeline.current
        if stream is self.timeline.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        if stream.graph is not None:
            stream.graph.broken = True
            raise CaptureError("CUDA error: the stream is capturing a graph already")
        self.mode, self.thread = capture_error_mode, threading.get_ident()
        self.handle = pool if pool is not None else next(self.timeline.numbers)
        self.timeline.log.append("capture_begin")
        stream.graph = self
        self.timeline.captures.append(self)
        self.timeline.pools_open.add(self.handle)

    def capture_end(self) -> None:
        stream = self.timeline.current
        if stream.graph is not self:
            raise RuntimeError("Capture must end on the same stream it began on.")
        stream.graph = None
        self.timeline.captures.remove(self)
        if self.broken:  # as in torch, the allocator is left as it is
            raise CaptureError("CUDA error: operation failed due to a previous error during capture")
        self.timeline.pools_open.discard(self.handle)
        self.timeline.log.append("capture_end")
        self.captured = True

    def replay(self) -> None:
        if not self.captured:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        self.timeline.forbid_in_capture("graph.replay")
        self.timeline.log.append("replay")
        for run in self.work:
            run()

    def reset(self) -> None:
        self.work, self.memory, self.captured = [], [], False

    def pool(self) -> Any:
        return self.handle
