"""Run host code that needs a CUDA GPU on a machine without one, with the kernels in Triton's interpreter.

    with pretend_gpu(cards.H200) as pretence:
        model = fastres.load("resnet18", None).cuda()

For a whole command: ``python -m fastres.bench.pretend_gpu --card H200 -m fastres.bench.measure.host --batch 1``.

Tensors (``tensors.py``) are real torch tensors on device ``cuda:0``, with their data in CPU memory. All work runs
immediately, so streams and events (``streams.py``) do not order it; they detect accesses that a GPU would not have
ordered. A graph capture records kernels and operations without running them. It rejects calls that CUDA rejects,
including the first launch of a kernel.

Results are computed on the CPU. The pretend GPU tests neither speed nor compiled kernel code. It needs a build of torch
without CUDA, and ``TRITON_INTERPRET=1`` set before Triton is imported.
"""

from __future__ import annotations

import argparse
import inspect
import os
import runpy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.errors import DeviceError
from fastres.kernels.routing import cards
from fastres.kernels.routing.cards import Gpu

from .streams import CaptureError, CUDAGraph, Event, Stream, Timeline
from .tensors import Memory, install, on_cpu

CARDS = {name: card for name, card in vars(cards).items() if isinstance(card, Gpu) and card is not cards.INTERPRETER}
DEVICE = torch.device("cuda", 0)
_MEMORY_BUS = 4000  # bits: an arbitrary width that turns whole GB/s into whole clock rates in kHz
_FLUSHED = 1 << 20  # bytes that Triton's do_bench overwrites between launches instead of a real cache's size


@dataclass(eq=False)
class Pretence:
    """The state of a pretend GPU.

    ``timeline`` has the log of calls and the races. ``memory`` has the allocated bytes and limits that you can set.
    ``launches`` lists the names of the kernels that ran, in order. ``loaded`` has the kernel specialisations that a
    capture may launch.
    """

    card: Gpu
    timeline: Timeline
    memory: Memory
    launches: list[str] = field(default_factory=list)
    loaded: set[Any] = field(default_factory=set)


@contextmanager
def pretend_gpu(
    card: Gpu = cards.H100, *, memory: int = 80 << 30, clock: Callable[[], float] = time.perf_counter
) -> Iterator[Pretence]:
    """Make this process see ``card``, with ``memory`` bytes, as its GPU. Everything is restored at the end.

    ``clock`` returns the seconds that events record. Raise ``DeviceError`` if Triton does not interpret kernels, or if
    torch has a GPU or was built for one.
    """
    if not cards.INTERPRETED:
        raise DeviceError("A pretend GPU needs Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported")
    if torch.backends.cuda.is_built() or torch.cuda.is_available():
        raise DeviceError("A pretend GPU needs torch without CUDA, but this build has CUDA: install torch's CPU build")
    timeline = Timeline(clock)
    pretence = Pretence(card, timeline, Memory(timeline, memory))
    with ExitStack() as within:
        for target, names in _substitutes(pretence).items():
            for name, value in names.items():
                within.enter_context(mock.patch.object(target, name, value, create=True))
        install(pretence.memory, within)
        within.enter_context(_compiling_children())
        cards.gpu_of.cache_clear()
        within.callback(cards.gpu_of.cache_clear)
        yield pretence


@contextmanager
def _compiling_children() -> Iterator[None]:
    """Let child processes compile kernels, while this process continues to interpret those that it imports later."""
    own = knobs.runtime.__dict__
    with mock.patch.dict(own, interpret=True), mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        yield


def properties(card: Gpu, memory: int) -> SimpleNamespace:
    """Return the properties that ``torch.cuda.get_device_properties`` returns for ``card``."""
    major, minor = divmod(int(card.arch.removeprefix("sm_")), 10) if not card.is_amd else (9, 4)
    return SimpleNamespace(
        name=card.name,
        major=major,
        minor=minor,
        multi_processor_count=card.multiprocessors,
        total_memory=memory,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=card.shared_memory,
        L2_cache_size=card.l2_cache,
        memory_clock_rate=round(card.gb_per_s * 8e9 / _MEMORY_BUS / 2e3),
        memory_bus_width=_MEMORY_BUS,
        gcnArchName=card.arch if card.is_amd else "",
        warp_size=64 if card.is_amd else 32,
    )


def indexed(device: Any) -> Any:
    """Return ``device`` with an index if it is a CUDA device without one. Return anything else unchanged."""
    if isinstance(device, (str, torch.device)):
        found = torch.device(device)
        if found.type == "cuda":
            if found.index:
                raise RuntimeError(f"CUDA error: invalid device ordinal: {found}; there is only one pretend GPU")
            return DEVICE
    return device


def _substitutes(pretence: Pretence) -> dict[Any, dict[str, Any]]:
    """Return the replacements for attributes of torch and Triton, by module or class and name."""
    timeline, memory = pretence.timeline, pretence.memory
    facts = properties(pretence.card, memory.total)
    interpreted = threading.RLock()  # the interpreter is not thread-safe

    def launch(kernel: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        with interpreted:
            _launch(pretence, partial(run, kernel, grid=grid, warmup=warmup), kernel, args, named)

    run = InterpretedFunction.run
    driver = SimpleNamespace(
        get_device_interface=lambda: torch.cuda,
        get_empty_cache_for_benchmark=lambda: torch.empty(_FLUSHED, dtype=torch.int8, device=DEVICE),
        clear_cache=lambda cache: cache.zero_(),
        get_current_device=lambda: 0,
    )
    return {
        torch.cuda: {**_device_functions(facts), **_stream_functions(timeline), **_memory_functions(memory, timeline)},
        torch.cuda.graphs.graph: {"default_capture_stream": None},
        torch.accelerator: {
            "is_available": lambda: True,
            "current_accelerator": lambda check_available=False: torch.device("cuda"),
            "set_device_index": lambda index: None,
            "current_device_index": lambda: 0,
        },
        torch.version: {"hip": "pretend"} if pretence.card.is_amd else {},
        torch._C: {
            "_host_emptyCache": lambda: None,
            "_cuda_endAllocateToPool": lambda device, pool: timeline.pools_open.discard(pool),
        },
        torch: {
            "Generator": _Generator,
            "tensor": _with_index(torch.tensor),
            "asarray": _with_index(torch.asarray),
            "as_tensor": _as_tensor(torch.as_tensor),
        },
        Tensor: {
            "to": _with_index(Tensor.to),
            "cuda": lambda tensor, device=DEVICE, **kwargs: tensor.to(DEVICE, **kwargs),
            "record_stream": lambda tensor, stream: _record_stream(timeline, tensor, stream),
            "pin_memory": lambda tensor, device=None: tensor,
            "__deepcopy__": _deep_copy(Tensor.__deepcopy__),
        },
        InterpretedFunction: {"run": launch},
        triton.runtime.driver: {"_active": driver},
    }


def _device_functions(facts: SimpleNamespace) -> dict[str, Any]:
    @contextmanager
    def device(which: Any) -> Iterator[None]:
        indexed(which)
        yield

    def of(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    return {
        "is_available": of(True),
        "is_initialized": of(True),
        "init": of(None),
        "_lazy_init": of(None),
        "device_count": of(1),
        "current_device": of(0),
        "set_device": of(None),
        "device": device,
        "get_device_name": of(facts.name),
        "get_device_capability": of((facts.major, facts.minor)),
        "get_device_properties": of(facts),
        "is_bf16_supported": of(facts.major >= 8),
        "manual_seed_all": of(None),
        "_sleep": of(None),
    }


def _stream_functions(timeline: Timeline) -> dict[str, Any]:
    class StreamContext:
        """Replaces ``torch.cuda.stream``. A class, because ``torch.cuda.graph`` may enter it and never exit."""

        def __init__(self, which: Stream | None) -> None:
            self.which = which

        def __enter__(self) -> None:
            self.before = timeline.current
            timeline.current = self.which or self.before

        def __exit__(self, *_: object) -> None:
            timeline.current = self.before

    def make_event(enable_timing: bool = False, **_: Any) -> Event:
        return Event(timeline, enable_timing)

    def make_graph(keep_graph: bool = False) -> CUDAGraph:
        timeline.log.append("CUDAGraph")
        return CUDAGraph(timeline, keep_graph)

    return {
        "Stream": lambda device=None, priority=0, **kwargs: Stream(timeline),
        "Event": make_event,
        "current_stream": lambda device=None: timeline.current,
        "default_stream": lambda device=None: timeline.default,
        "set_stream": lambda which: setattr(timeline, "current", which),
        "stream": StreamContext,
        "synchronize": lambda device=None: timeline.host_waits("synchronize"),
        "CUDAGraph": make_graph,
        "graph_pool_handle": lambda: (0, next(timeline.numbers)),
        "is_current_stream_capturing": lambda: timeline.capturing is not None,
    }


def _memory_functions(memory: Memory, timeline: Timeline) -> dict[str, Any]:
    def reset_peak(device: Any = None) -> None:
        memory.peak = memory.allocated

    return {
        "memory_allocated": lambda device=None: memory.allocated,
        "max_memory_allocated": lambda device=None: memory.peak,
        "memory_reserved": lambda device=None: memory.allocated,
        "max_memory_reserved": lambda device=None: memory.peak,
        "reset_peak_memory_stats": reset_peak,
        "mem_get_info": lambda device=None: (memory.total - memory.allocated, memory.total),
        "empty_cache": lambda: timeline.log.append("empty_cache"),
    }


def _record_stream(timeline: Timeline, tensor: Tensor, stream: Stream) -> None:
    timeline.log.append("record_stream")
    if block := timeline.blocks.get(tensor.untyped_storage().data_ptr()):
        block.noted.add(stream.number)


class _Generator(torch.Generator):
    """A ``torch.Generator`` that is always on the CPU, because CPU kernels draw the numbers."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return torch._C.Generator.__new__(cls, "cpu")  # type: ignore[call-arg]


def _with_index(function: Callable[..., Any]) -> Callable[..., Any]:
    def with_index(*args: Any, **kwargs: Any) -> Any:
        first, *rest = args or ((),)
        given = [first, *map(indexed, rest)] if args else []
        if "device" in kwargs:
            kwargs["device"] = indexed(kwargs["device"])
        return function(*given, **kwargs)

    return with_index


def _as_tensor(function: Callable[..., Any]) -> Callable[..., Any]:
    plain = _with_index(function)

    def as_tensor(data: Any, *args: Any, **kwargs: Any) -> Any:
        found = getattr(data, "__cuda_array_interface__", None)
        if found is not None and not isinstance(data, Tensor):
            return torch.from_numpy(np.array(SimpleNamespace(__array_interface__=found))).to(DEVICE)
        return plain(data, *args, **kwargs)

    return as_tensor


def _deep_copy(function: Callable[..., Any]) -> Callable[..., Any]:
    def deep_copy(tensor: Tensor, memo: dict[int, Any]) -> Any:
        if not tensor.is_cuda:
            return function(tensor, memo)
        if id(tensor) not in memo:
            copied = tensor.detach().clone()
            if isinstance(tensor, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, tensor.requires_grad)
            memo[id(tensor)] = copied
        return memo[id(tensor)]

    return deep_copy


def _launch(pretence: Pretence, run: Callable[..., None], kernel: Any, args: Any, named: dict[str, Any]) -> None:
    """Run a kernel, or record it in the graph that is being captured."""
    timeline, name = pretence.timeline, kernel.fn.__name__
    parameters = list(inspect.signature(kernel.fn).parameters.values())
    given = dict(zip((parameter.name for parameter in parameters), args, strict=False)) | named
    tensors = [found for value in given.values() for found in _tensors(value)]
    if not any(tensor.is_cuda for tensor in tensors):
        return run(*args, **named)
    if not all(tensor.is_cuda for tensor in tensors):
        raise ValueError(f"Pointer argument of {name} cannot be accessed from Triton (cpu tensor?)")

    def again() -> None:
        pretence.launches.append(name)
        before = {id(tensor): _bytes(tensor).clone() for tensor in tensors}
        # The interpreter has no early starts. They make no difference: every kernel ends before the next one begins.
        run(**{key: False if key == "EARLY" else _host(value) for key, value in given.items()})
        writes = [tensor for tensor in tensors if not torch.equal(before[id(tensor)], _bytes(tensor))]
        written = {id(tensor) for tensor in writes}
        timeline.use([tensor for tensor in tensors if id(tensor) not in written], writes, name)

    key = (kernel.fn, tuple(_specialised(kernel, parameter, given) for parameter in parameters),
           tuple(sorted((k, v) for k, v in given.items() if k.startswith("num_"))))  # fmt: skip
    graph = timeline.capturing
    if graph is None:
        pretence.loaded.add(key)
        return again()
    if key not in pretence.loaded:
        graph.broken = True
        raise CaptureError(f"CUDA error: operation not permitted when stream is capturing: {name} is not loaded yet")
    graph.memory += tensors
    graph.work.append(again)
    return None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [found for item in value for found in _tensors(item)]
    value = value.base if isinstance(value, TensorDescriptor) else value
    return [value] if isinstance(value, Tensor) else []


def _host(value: Any) -> Any:
    """Return an argument in the form that the interpreter takes."""
    if isinstance(value, (tuple, list)):
        return type(value)(_host(item) for item in value)
    return replace(value, base=on_cpu(value.base)) if isinstance(value, TensorDescriptor) else on_cpu(value)


def _bytes(tensor: Tensor) -> Tensor:
    """Return the bytes that a launch may change: the tensor's whole storage, on the CPU."""
    storage = on_cpu(tensor).untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _specialised(kernel: Any, parameter: inspect.Parameter, given: dict[str, Any]) -> Any:
    """Return the facts that Triton specialises on: the value of a constant, or properties of another argument."""
    value = given.get(parameter.name, parameter.default)
    if "constexpr" in str(parameter.annotation):
        return value
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, tuple(value.block_shape)
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        kept = kernel.kwargs.get("do_not_specialize") or ()
        index = list(inspect.signature(kernel.fn).parameters).index(parameter.name)
        return type(value) if parameter.name in kept or index in kept else (value == 1, value % 16 == 0)
    return type(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a module on a pretend GPU, as ``python -m`` does."""
    parser = argparse.ArgumentParser(prog="python -m bench.pretend_gpu", description="Run a module on a pretend GPU.")
    parser.add_argument("--card", choices=CARDS, default="H100", help="the GPU to imitate (default: %(default)s)")
    parser.add_argument("-m", dest="module", required=True, nargs=argparse.REMAINDER, help="module and its arguments")
    given = parser.parse_args(arguments)
    module, *rest = given.module
    with pretend_gpu(CARDS[given.card]), mock.patch("sys.argv", [module, *rest]):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
