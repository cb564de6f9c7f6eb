"""oneDNN's objects, with owners that destroy them, and the memory that primitives read and write."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int64
from dataclasses import dataclass

import torch
from torch import Tensor

from .library import Library
from .loop import Execution

ALIGNMENT = 64  # bytes: a cache line, and the longest vector

# Arguments of a primitive.
SOURCE, FACTORS, DESTINATION, WEIGHTS, BIAS, SCRATCHPAD = 1, 2, 17, 33, 41, 80
SCALES = 4096  # to be added to another argument


class Owned:
    """An object of oneDNN's. It is destroyed with the last reference."""

    __slots__ = ("__weakref__", "_as_parameter_", "_destroy")

    def __init__(self, address: int, destroy: Callable[[int], None]) -> None:
        self._as_parameter_ = address
        self._destroy = destroy

    def __del__(self) -> None:
        self._destroy(self._as_parameter_)


class _Argument(ctypes.Structure):
    """dnnl_exec_arg_t"""

    _fields_ = (("argument", ctypes.c_int), ("memory", ctypes.c_void_p))


@dataclass(eq=False)
class Packed:
    """Weights in one of oneDNN's layouts. ``data``, bytes, is empty until they are written."""

    layout: Owned
    data: Tensor

    @property
    def block(self) -> tuple[int, int]:
        """The address and the size of the memory that holds the data, maybe together with other weights."""
        storage = self.data.untyped_storage()
        return storage.data_ptr(), storage.nbytes()


@dataclass(frozen=True, eq=False)
class Operation:
    """A primitive with the arguments that all its runs share, and the layouts of the others."""

    primitive: Owned
    source: Owned
    destination: Owned
    scratchpad: Owned
    scratchpad_bytes: int
    packed: Packed | None
    fixed: list[tuple[int, Owned]]
    kept: list[object]  # lives as long
    implementation: str  # oneDNN's name of it, such as "brg_conv_fwd:avx512_core"

    @property
    def is_slow(self) -> bool:
        """True if oneDNN has only a plain implementation, many times slower than the others."""
        return self.implementation.startswith(("ref", "simple"))


def new_stream(library: Library) -> Owned:
    """Return a stream, in which primitives run one after another. Each thread needs its own."""
    return Owned(library.created(library.stream_create, library.engine, 1), library.stream_destroy)


def memory(library: Library, layout: Owned, address: int) -> Owned:
    """Return oneDNN's view of the memory at ``address``."""
    made = library.created(library.memory_create, layout, library.engine, address)
    return Owned(made, library.memory_destroy)


def bound(
    library: Library,
    operation: Operation,
    stream: Owned,
    source: Owned,
    destination: Owned,
    scratchpad: int,
    kept: list[object],
) -> Execution:
    """Return a run of ``operation`` from one memory to another.

    ``scratchpad`` is an address. What must live as long as the run is added to ``kept``.
    """
    memories = [*operation.fixed, (SOURCE, source), (DESTINATION, destination)]
    if operation.scratchpad_bytes:
        memories.append((SCRATCHPAD, memory(library, operation.scratchpad, scratchpad)))
    arguments = _arguments(memories)
    kept += (memories, operation, stream, arguments)
    addresses = (operation.primitive._as_parameter_, stream._as_parameter_)
    return Execution(*addresses, len(memories), ctypes.addressof(arguments))


def run_once(library: Library, primitive: Owned, memories: Sequence[tuple[int, Owned]]) -> None:
    """Run ``primitive`` on these arguments, and wait for it."""
    stream = new_stream(library)
    library.primitive_execute(primitive, stream, len(memories), _arguments(memories))
    library.stream_wait(stream)


def aligned(size: int) -> Tensor:
    """Return ``size`` bytes that begin at a multiple of :data:`ALIGNMENT`."""
    data = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
    return data[-data.data_ptr() % ALIGNMENT :][:size]


def _arguments(memories: Sequence[tuple[int, Owned]]) -> ctypes.Array[_Argument]:
    return (_Argument * len(memories))(*[_Argument(argument, made._as_parameter_) for argument, made in memories])


def dimensions(values: Sequence[int]) -> ctypes.Array[c_int64]:
    return (c_int64 * len(values))(*values)
