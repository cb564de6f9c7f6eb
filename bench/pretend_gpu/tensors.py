"""Tensors of a pretend GPU (``cuda.py``): real torch tensors on ``cuda:0``, with their data in CPU memory.

DLPack states the device of a tensor's memory. With that field changed, torch makes a CUDA tensor from CPU memory. A
build of torch without CUDA has no kernels for such a tensor. So every ATen operation that has a CPU kernel gets a CUDA
kernel here, which runs the CPU kernel on the same memory. Views, inference tensors, devices in error messages and
``numpy()`` are torch's own.

New memory is filled with garbage, because it has arbitrary contents on a GPU: NaN if the dtype has NaN.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .streams import Block, Timeline

aten = torch.ops.aten
_CPU, _CUDA = 1, 2  # DLPack's device numbers
_CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_ALIGNMENT = 512  # bytes, as in torch's allocator on a GPU
_SPOILT = 0x7F  # fills new memory of integers

# Operations that make Python or the CPU wait for their result.
_WAITING = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim"}
# Operations that take tensors of both devices.
_MIXED = {"index", "index_put_", "_index_put_impl_"}

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _relabelled(tensor: Tensor, device: int) -> Tensor:
    """Return a tensor on another device that shares the memory of ``tensor`` and keeps it alive."""
    capsule = torch._C._to_dlpack(tensor)
    place = _capsule_pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)  # the field after the data pointer
    ctypes.c_int32.from_address(place).value, ctypes.c_int32.from_address(place + 4).value = device, 0
    found = torch._C._from_dlpack(capsule)
    if found.stride() != tensor.stride():  # DLPack may change the strides of single elements
        found = aten.as_strided.default.redispatch(_CPU_KERNELS, found, tensor.shape, tensor.stride(), 0)
    return found


def on_cpu(value: Any) -> Any:
    """Return a CUDA tensor as a CPU tensor on the same memory, and anything else unchanged."""
    return _relabelled(value, _CPU) if isinstance(value, Tensor) and value.is_cuda else value


def on_gpu(value: Any) -> Any:
    """Return a CPU tensor as a CUDA tensor on the same memory, and anything else unchanged."""
    return _relabelled(value, _CUDA) if isinstance(value, Tensor) and not value.is_cuda else value


def spoil(tensor: Tensor) -> Tensor:
    """Overwrite ``tensor`` (on the CPU) with garbage that no result may depend on."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(torch.nan)
    return tensor.fill_(tensor.dtype == torch.bool or _SPOILT)


@dataclass(eq=False)
class Memory:
    """The memory of a pretend GPU."""

    timeline: Timeline
    total: int  # bytes
    largest: int | None = None  # bytes; larger allocations fail
    for_captures: int | None = None  # bytes that all captures together may allocate
    allocated: int = 0
    peak: int = 0
    captured: int = 0

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a new CUDA tensor. Raise ``torch.OutOfMemoryError`` if it exceeds a limit."""
        elements = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        nbytes = elements * dtype.itemsize
        graph = self.timeline.capturing
        self.captured += nbytes if graph is not None else 0
        out_of_captures = graph is not None and self.for_captures is not None and self.captured > self.for_captures
        too_large = self.largest is not None and nbytes > self.largest
        if out_of_captures or too_large or self.allocated + nbytes > self.total:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes (a pretend GPU).")
        memory = np.empty(nbytes + _ALIGNMENT, dtype=np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        memory = memory[start : start + nbytes]
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)
        address = memory.ctypes.data
        weakref.finalize(memory, self._freed, nbytes, address).atexit = False
        cpu = torch.from_numpy(memory).view(dtype) if nbytes else torch.empty(0, dtype=dtype)
        found: Tensor = on_gpu(spoil(cpu.as_strided(tuple(size), tuple(stride))))
        self.timeline.blocks[address] = Block(self.timeline.current if graph is None else None)
        if graph is not None:
            graph.memory.append(found)
        return found

    def copied(self, value: Tensor) -> Tensor:
        """Copy a result of the CPU into memory of the pretend GPU."""
        found = self.empty(value.shape, value.stride(), value.dtype)
        on_cpu(found).copy_(value)
        return found

    def _freed(self, nbytes: int, address: int) -> None:
        self.allocated -= nbytes
        self.timeline.freed(address)


def install(memory: Memory, within: ExitStack) -> None:
    """Register kernels for CUDA tensors with torch until ``within`` ends."""
    _install_device_guard(within)
    library = torch.library.Library("aten", "IMPL", "CUDA")
    within.callback(library._destroy)
    special = {
        "aten::empty.memory_format": _empty,
        "aten::empty_strided": _empty_strided,
        "aten::copy_": _copy,
        "aten::resize_": _resize,
    }
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    # Kernels of structured operations and of a few composite ones need the C++ side of CUDA, so they are replaced too.
    wanted = ("CPU", "CompositeExplicitAutogradNonFunctional")
    for name in torch._C._dispatch_get_all_op_names():
        if name in special:
            kernel = special[name](memory)
        elif name == "aten::convolution" or (
            name.startswith("aten::") and any(has_kernel(name, key) for key in wanted)
        ):
            packet, _, overload = name.removeprefix("aten::").partition(".")
            kernel = _kernel(memory, getattr(getattr(aten, packet), overload or "default"))
        else:
            continue
        library.impl(name.removeprefix("aten::"), kernel)


def _install_device_guard(within: ExitStack) -> None:
    """Make C++ code that sets the current device do nothing for CUDA, as it does for the CPU."""
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")  # CPU, CUDA
    guards[1] = guards[0]
    within.callback(guards.__setitem__, 1, None)


def _kernel(memory: Memory, op: Any) -> Callable[..., Any]:
    """Return ``op`` for CUDA tensors, which runs the CPU kernel on their memory."""
    timeline, schema = memory.timeline, op._schema
    name = schema.name.removeprefix("aten::")
    mutated = {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write}
    is_view = any(value.alias_info and not value.alias_info.is_write for value in schema.returns)
    if is_view or name == "set_":  # these touch no data: torch's kernel takes CUDA tensors
        return lambda *args, **kwargs: op.redispatch(_CPU_KERNELS, *args, **kwargs)
    names = [argument.name for argument in schema.arguments]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("device") is not None:
            given["device"] = "cpu"
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        if name not in _MIXED and any(not tensor.is_cuda and tensor.dim() for tensor in tensors):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({op})"
            )
        if name in _WAITING:
            timeline.host_waits(name, timeline.current)
        writes = [leaf for key in mutated for leaf in tree_leaves(given[key]) if isinstance(leaf, Tensor)]
        graph = timeline.capturing
        results = _run(op, given, mutated, memory, discard=graph is not None)
        fresh = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor) and leaf not in Identical(writes)]
        reads = [tensor for tensor in tensors if tensor.is_cuda and tensor not in Identical(writes)]

        def again() -> None:
            timeline.use(reads, [*writes, *fresh], name)
            anew = _run(op, given, mutated, memory)
            made = [leaf for leaf in tree_leaves(anew) if isinstance(leaf, Tensor) and leaf not in Identical(writes)]
            for old, new in zip(fresh, made, strict=True):
                on_cpu(old).copy_(on_cpu(new))

        if graph is None:
            timeline.use(reads, [*writes, *fresh], name)
        else:
            graph.memory += tensors
            graph.work.append(again)
            for tensor in fresh:
                spoil(on_cpu(tensor))
        return results

    return kernel


class Identical:
    """A set of tensors compared by identity. ``in`` on a list would compare their elements."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.known = {id(tensor) for tensor in tensors}

    def __contains__(self, tensor: object) -> bool:
        return id(tensor) in self.known


def _run(op: Any, given: dict[str, Any], mutated: set[str], memory: Memory, discard: bool = False) -> Any:
    """Run ``op`` on CPU views of the memory. Return CUDA tensors. With ``discard``, leave the arguments unchanged."""
    originals: dict[int, Tensor] = {}
    held: list[Tensor] = []  # keeps them alive, so that no two have the same id

    def alias(value: Any, changes: bool) -> Any:
        found = on_cpu(value)
        if isinstance(value, Tensor) and value.is_cuda and changes:
            if value.shape == (0,):  # out=: the operation resizes it, which needs a CPU tensor of its own
                found = torch.empty(0, dtype=value.dtype)
            elif discard:
                found = found.clone()
            originals[id(found)] = value
            held.append(found)
        return found

    def restored(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        original = originals.get(id(value))
        if original is None:
            return memory.copied(value)
        if original.shape != value.shape:
            made = memory.copied(value)
            place = (made.untyped_storage(), made.storage_offset(), made.shape, made.stride())
            aten.set_.source_Storage_storage_offset.redispatch(_CPU_KERNELS, original, *place)
        return original

    arguments = {key: tree_map(lambda value, key=key: alias(value, key in mutated), v) for key, v in given.items()}
    return tree_map(restored, op(**arguments))


def _strides(size: Sequence[int], memory_format: torch.memory_format | None) -> tuple[int, ...]:
    return torch.empty(tuple(size), device="meta", memory_format=memory_format or torch.contiguous_format).stride()


def _empty(memory: Memory) -> Callable[..., Tensor]:
    def kernel(size: Sequence[int], *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
        return memory.empty(size, _strides(size, memory_format), dtype or torch.get_default_dtype())

    return kernel


def _empty_strided(memory: Memory) -> Callable[..., Tensor]:
    def kernel(size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, **_: Any) -> Tensor:
        return memory.empty(size, stride, dtype or torch.get_default_dtype())

    return kernel


def _resize(memory: Memory) -> Callable[..., Tensor]:
    def kernel(tensor: Tensor, size: Sequence[int], *, memory_format: Any = None) -> Tensor:
        if tuple(tensor.shape) != tuple(size):
            made = memory.empty(size, _strides(size, memory_format), tensor.dtype)
            place = (made.untyped_storage(), 0, made.shape, made.stride())
            aten.set_.source_Storage_storage_offset.redispatch(_CPU_KERNELS, tensor, *place)
        return tensor

    return kernel


def _copy(memory: Memory) -> Callable[..., Tensor]:
    timeline = memory.timeline

    def kernel(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        between = not (target.is_cuda and source.is_cuda)
        if between and (timeline.capturing is not None or not non_blocking):
            timeline.host_waits("copy between devices", timeline.current)

        def run() -> None:
            timeline.use([source] * source.is_cuda, [target] * target.is_cuda, "copy_")
            on_cpu(target).copy_(on_cpu(source))

        graph = timeline.capturing
        if graph is None:
            run()
        else:
            graph.memory += [target, source]
            graph.work.append(run)
        return target

    return kernel
