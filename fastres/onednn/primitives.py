"""Convolutions and pools as oneDNN primitives: built once for a shape, then run in given memory.

Activations are channels-last. A primitive's weights are in the layout that oneDNN prefers for its shape and the number
of threads; primitives with the same layout share them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int64
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .library import Library

Shape = tuple[int, ...]

ALIGNMENT = 64  # bytes: a cache line, and the longest vector

# Values of oneDNN's enumerations.
_DTYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.int32: 4, torch.int8: 5, torch.uint8: 6}
_ANY, _LINE, _CHANNELS_LAST, _GROUPED_WEIGHTS = 1, 2, 22, 31  # layouts: any, x, nhwc (and ohwi), gohwi
_INFERENCE, _DIRECT, _RELU = 96, 1, 32
_POOLS = {"max": 511, "average": 1023}  # the average of the pixels inside the image
_USER_SCRATCHPAD = 1
_SOURCE, _DESTINATION, _WEIGHTS, _BIAS, _SCRATCHPAD = 1, 17, 33, 41, 80  # arguments of a primitive
_SCALES, _ZERO_POINTS = 4096, 8192
_QUERY_INFO, _QUERY_SOURCE, _QUERY_WEIGHTS, _QUERY_DESTINATION, _QUERY_SCRATCHPAD = 8, 129, 131, 133, 136


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


@dataclass(frozen=True, eq=False)
class Packed:
    """Weights in one of oneDNN's layouts."""

    layout: Owned
    data: Tensor  # bytes


@dataclass(frozen=True)
class Levels:
    """The scales of a convolution in 8 bit: of its input, weights ``[K]``, output and residual.

    A level ``q`` stands for ``scale · (q − zero_point)``. The input's zero point is 0.
    """

    input: float
    weights: Tensor
    output: float
    output_zero_point: int = 0
    residual: float = 1.0
    residual_zero_point: int = 0


@dataclass(frozen=True, eq=False)
class Operation:
    """A primitive with the arguments that all its runs share, and the layouts of the others."""

    primitive: Owned
    source: Owned
    destination: Owned
    scratchpad: Owned
    scratchpad_bytes: int
    implementation: str
    packed: Packed | None = None
    fixed: list[tuple[int, Owned]] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)


class Builder:
    """Builds operations, for the number of threads that torch has now."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def convolution(
        self,
        shape: Shape,
        output: Shape,
        weight: Tensor,
        bias: Tensor,
        *,
        stride: int,
        padding: int,
        groups: int,
        relu: bool,
        add: bool,
        dtype: torch.dtype,
        known: list[Packed],
        levels: Levels | None = None,
    ) -> Operation:
        """Build conv + bias (+ what the output's memory holds, if ``add``) (+ ReLU), with shapes in NHWC.

        ``weight`` is KRSC, of ``dtype``, or int8 with ``levels``; activations are then uint8. ``known`` are this
        weight's layouts so far: one of them is used if oneDNN prefers it, and a new one is added.
        """
        (_, h, w, c), (_, p, q, k) = shape, output
        _, r, s, _ = weight.shape
        filters: Shape
        stored = dtype if levels is None else torch.uint8
        source, destination = self._activation(shape, stored), self._activation(output, stored)
        if groups == 1:
            filters, plain = (k, c, r, s), _CHANNELS_LAST
        else:
            filters, plain = (groups, k // groups, c // groups, r, s), _GROUPED_WEIGHTS
        line = self._layout((k,), torch.float32, _LINE)
        after = [(p - 1) * stride + r - padding - h, (q - 1) * stride + s - padding - w]
        attributes, fixed, kept = self._attributes(relu, add, levels, groups)
        description = self._described(
            self._library.convolution_forward_primitive_desc_create, self._library.engine, _INFERENCE, _DIRECT, source,
            self._layout(filters, weight.dtype, _ANY), line, destination, _dimensions([stride, stride]),
            _dimensions([0, 0]), _dimensions([padding, padding]), _dimensions(after), attributes,
        )  # fmt: skip
        packed = self._packed(description, self._layout(filters, weight.dtype, plain), weight.contiguous(), known)
        bias = bias.to(torch.float32).contiguous()
        fixed += [
            (_WEIGHTS, self._memory(packed.layout, packed.data.data_ptr())),
            (_BIAS, self._memory(line, bias.data_ptr())),
        ]
        return self._operation(description, packed, fixed, [*kept, bias])

    def pool(self, shape: Shape, output: Shape, mode: str, kernel: int, padding: int, dtype: torch.dtype) -> Operation:
        """Build a pool of stride 2; ``mode`` is ``"max"`` or ``"average"``, of the pixels inside the image."""
        after = [(out - 1) * 2 + kernel - padding - size for out, size in zip(output[1:3], shape[1:3], strict=True)]
        attributes, *_ = self._attributes(False, False, None, 1)
        description = self._described(
            self._library.pooling_forward_primitive_desc_create, self._library.engine, _INFERENCE, _POOLS[mode],
            self._activation(shape, dtype), self._activation(output, dtype), _dimensions([2, 2]),
            _dimensions([kernel, kernel]), _dimensions([0, 0]), _dimensions([padding, padding]), _dimensions(after),
            attributes,
        )  # fmt: skip
        return self._operation(description, None, [], [])

    def _operation(
        self, description: Owned, packed: Packed | None, fixed: list[tuple[int, Owned]], kept: list[object]
    ) -> Operation:
        library = self._library
        primitive = Owned(library.created(library.primitive_create, description), library.primitive_destroy)
        scratchpad = self._queried(description, _QUERY_SCRATCHPAD)
        name = ctypes.c_char_p()
        library.primitive_desc_query(description, _QUERY_INFO, 0, ctypes.byref(name))
        return Operation(
            primitive,
            self._queried(description, _QUERY_SOURCE),
            self._queried(description, _QUERY_DESTINATION),
            scratchpad,
            library.memory_desc_get_size(scratchpad),
            (name.value or b"").decode(),
            packed,
            fixed,
            kept,
        )

    def _attributes(
        self, relu: bool, add: bool, levels: Levels | None, groups: int
    ) -> tuple[Owned, list[tuple[int, Owned]], list[object]]:
        """Return a primitive's attributes, the arguments that they need, and what must live as long."""
        library = self._library
        after = Owned(library.created(library.post_ops_create), library.post_ops_destroy)
        attributes = Owned(library.created(library.primitive_attr_create), library.primitive_attr_destroy)
        library.primitive_attr_set_scratchpad_mode(attributes, _USER_SCRATCHPAD)
        if add:
            scale, zero_point = (1.0, 0) if levels is None else (levels.residual, levels.residual_zero_point)
            library.post_ops_append_sum(after, scale, zero_point, 0)
        if relu:
            library.post_ops_append_eltwise(after, _RELU, 0.0, 0.0)
        library.primitive_attr_set_post_ops(attributes, after)
        fixed: list[tuple[int, Owned]] = []
        kept: list[object] = []
        if levels is None:
            return attributes, fixed, kept
        every = 1 if groups == 1 else 3  # a mask: one scale for each index of the first dimension, or of the first two
        numbers = {_SOURCE: torch.tensor([levels.input], dtype=torch.float32, device="cpu"), _WEIGHTS: levels.weights,
                   _DESTINATION: torch.tensor([levels.output], dtype=torch.float32, device="cpu")}  # fmt: skip
        for argument, values in numbers.items():
            library.primitive_attr_set_scales_mask(attributes, argument, every if argument == _WEIGHTS else 0)
            fixed.append((_SCALES | argument, self._vector(values.to(torch.float32).contiguous(), kept)))
        if levels.output_zero_point:
            library.primitive_attr_set_zero_points_mask(attributes, _DESTINATION, 0)
            point = torch.tensor([levels.output_zero_point], dtype=torch.int32, device="cpu")
            fixed.append((_ZERO_POINTS | _DESTINATION, self._vector(point, kept)))
        return attributes, fixed, kept

    def _packed(self, description: Owned, plain: Owned, weight: Tensor, known: list[Packed]) -> Packed:
        """Return ``weight`` in the layout of the primitive: one of the ``known`` ones, or a new one."""
        library = self._library
        layout = self._queried(description, _QUERY_WEIGHTS)
        for packed in known:
            if library.memory_desc_equal(packed.layout, layout):
                return packed
        packed = Packed(layout, aligned(library.memory_desc_get_size(layout)))
        change = self._described(
            library.reorder_primitive_desc_create, plain, library.engine, layout, library.engine, None
        )
        primitive = Owned(library.created(library.primitive_create, change), library.primitive_destroy)
        memories = [
            (_SOURCE, self._memory(plain, weight.data_ptr())),
            (_DESTINATION, self._memory(layout, packed.data.data_ptr())),
        ]
        stream = new_stream(library)
        library.primitive_execute(primitive, stream, len(memories), _arguments(memories))
        library.stream_wait(stream)
        known.append(packed)
        return packed

    def _activation(self, shape: Shape, dtype: torch.dtype) -> Owned:
        n, h, w, c = shape
        return self._layout((n, c, h, w), dtype, _CHANNELS_LAST)

    def _layout(self, shape: Sequence[int], dtype: torch.dtype, tag: int) -> Owned:
        library = self._library
        made = library.created(library.memory_desc_create_with_tag, len(shape), _dimensions(shape), _DTYPES[dtype], tag)
        return Owned(made, library.memory_desc_destroy)

    def _queried(self, description: Owned, what: int) -> Owned:
        """Return a copy of one of the layouts of a primitive."""
        library = self._library
        layout = library.primitive_desc_query_md(description, what, 0)
        return Owned(library.created(library.memory_desc_clone, layout), library.memory_desc_destroy)

    def _described(self, create: Callable[..., None], *arguments: object) -> Owned:
        return Owned(self._library.created(create, *arguments), self._library.primitive_desc_destroy)

    def _vector(self, values: Tensor, kept: list[object]) -> Owned:
        kept.append(values)
        return self._memory(self._layout(values.shape, values.dtype, _LINE), values.data_ptr())

    def _memory(self, layout: Owned, address: int) -> Owned:
        return memory(self._library, layout, address)


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
) -> Callable[[], None]:
    """Return a function that runs ``operation`` from one memory to another; ``scratchpad`` is an address.

    What must live as long as the function is added to ``kept``.
    """
    memories = [*operation.fixed, (_SOURCE, source), (_DESTINATION, destination)]
    if operation.scratchpad_bytes:
        memories.append((_SCRATCHPAD, memory(library, operation.scratchpad, scratchpad)))
    kept += (memories, operation)
    return partial(library.primitive_execute, operation.primitive, stream, len(memories), _arguments(memories))


def aligned(size: int) -> Tensor:
    """Return ``size`` bytes that begin at a multiple of :data:`ALIGNMENT`."""
    data = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
    return data[-data.data_ptr() % ALIGNMENT :][:size]


def _arguments(memories: Sequence[tuple[int, Owned]]) -> ctypes.Array[_Argument]:
    return (_Argument * len(memories))(*[_Argument(argument, made._as_parameter_) for argument, made in memories])


def _dimensions(values: Sequence[int]) -> ctypes.Array[c_int64]:
    return (c_int64 * len(values))(*values)
