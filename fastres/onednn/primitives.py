"""Convolutions, pools and products as oneDNN primitives: built once for a shape, then run in given memory.

Activations are channels-last, or in blocks of channels. A primitive's weights are in the layout that oneDNN prefers for
its shape and the number of threads; primitives with the same layout share them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import byref, c_char_p
from dataclasses import dataclass

import torch
from torch import Tensor

from fastres.errors import OneDnnError

from .library import Library
from .objects import (
    ALIGNMENT,
    BIAS,
    DESTINATION,
    FACTORS,
    SCALES,
    SOURCE,
    WEIGHTS,
    Operation,
    Owned,
    Packed,
    aligned,
    dimensions,
    memory,
    run_once,
)

Shape = tuple[int, ...]

# Values of oneDNN's enumerations.
_DTYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.int32: 4, torch.int8: 5, torch.uint8: 6}
# Layouts: any, x, ab, nchw, nhwc (and ohwi), gohwi, and the blocked ones by the channels of a block: nChw8c, nChw16c
_ANY, _LINE, _ROWS, _PLANES, _CHANNELS_LAST, _GROUPED_WEIGHTS = 1, 2, 3, 5, 22, 31
_BLOCKED = {8: 102, 16: 78}
_INFERENCE, _DIRECT, _RELU = 96, 1, 32
_POOLS = {"max": 511, "average": 1023}  # the average of the pixels inside the image
_ADDED, _MULTIPLIED = 0x1FFF0, 0x1FFF1
_POST_OPERATIONS = (32768, 16384)  # the arguments of the first post-operation, in newer and in older versions
_USER_SCRATCHPAD = 1
_QUERY_IMPLEMENTATION, _QUERY_SOURCE, _QUERY_WEIGHTS, _QUERY_DESTINATION, _QUERY_SCRATCHPAD = 8, 129, 131, 133, 136
_QUERY_ARGUMENT = 255


@dataclass(frozen=True)
class Levels:
    """The scales of a convolution or product in 8 bit: of its input, weights ``[K]``, output and residual.

    A level ``q`` stands for ``scale · (q − zero_point)``. The input's zero point is 0. An output in float32 has none,
    nor have weights that stand for themselves.
    """

    input: float
    weights: Tensor | None
    output: float | None = None
    output_zero_point: int = 0
    residual: float = 1.0
    residual_zero_point: int = 0

    @property
    def unit(self) -> float:
        """What a step of one in the output stands for."""
        return 1.0 if self.output is None else self.output

    @property
    def clips_at_zero(self) -> bool:
        """True if the lowest level of the output stands for 0, so that storing a level does what ReLU would do."""
        return self.output is not None and self.output_zero_point == 0

    def bias(self, bias: Tensor | None, channels: int, add: bool) -> Tensor:
        """Return the bias ``[K]`` in steps of the output, together with all zero points."""
        moved = self.output_zero_point - (self.residual_zero_point * self.residual / self.unit if add else 0.0)
        if bias is None:
            bias = torch.zeros(channels, dtype=torch.float32, device="cpu")
        return (bias.double() / self.unit + moved).to(torch.float32)


class Builder:
    """Builds operations, for the number of threads that torch has now.

    Activations are in blocks of ``block`` channels, 8 or 16, and images one channel after another; both are
    channels-last without ``block``. Operations with weights can run after :meth:`pack`.
    """

    def __init__(self, library: Library, block: int | None = None) -> None:
        self._library, self._block = library, block
        self._unpacked: list[tuple[Packed, Owned, Tensor, list[Packed]]] = []
        self._unaddressed: list[tuple[Packed, Owned]] = []

    def pack(self) -> None:
        """Write the weights of all operations since the last call into one block of memory, which may have huge pages.

        A weight on pages of 4 KB takes longer to read, above all a small batch's.
        """
        library, new = self._library, self._unpacked
        sizes = [-(-library.memory_desc_get_size(packed.layout) // ALIGNMENT) * ALIGNMENT for packed, *_ in new]
        parts = aligned(sum(sizes)).split(sizes) if new else ()
        for (packed, plain, weight, _), part in zip(new, parts, strict=True):
            change = self._reorder(plain, packed.layout, None)
            primitive = Owned(library.created(library.primitive_create, change), library.primitive_destroy)
            memories = [
                (SOURCE, self._memory(plain, weight.data_ptr())),
                (DESTINATION, self._memory(packed.layout, part.data_ptr())),
            ]
            run_once(library, primitive, memories)
            packed.data = part
        for packed, place in self._unaddressed:
            library.memory_set_data_handle(place, packed.data.data_ptr())
        for packed, *_, known in new:
            known.append(packed)
        self._unpacked, self._unaddressed = [], []

    def convolution(
        self,
        shape: Shape,
        output: Shape,
        weight: Tensor,
        bias: Tensor | None,
        *,
        known: list[Packed],
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        relu: bool = False,
        add: bool = False,
        levels: Levels | None = None,
    ) -> Operation:
        """Build conv (+ bias) (+ what the output's memory holds, if ``add``) (+ ReLU), with shapes in NHWC.

        ``weight`` is KRSC, and activations have its dtype, or are uint8 if it is int8, with ``levels``. ``known`` are
        this weight's layouts so far: one of them is used if oneDNN prefers it, and :meth:`pack` adds a new one.
        """
        (_, h, w, c), (_, p, q, k) = shape, output
        _, r, s, _ = weight.shape
        filters: Shape = (k, c, r, s) if groups == 1 else (groups, k // groups, c // groups, r, s)
        plain = _CHANNELS_LAST if groups == 1 else _GROUPED_WEIGHTS
        after = [(p - 1) * stride + r - padding - h, (q - 1) * stride + s - padding - w]
        read = written = weight.dtype
        if levels is not None:
            read, written = torch.uint8, torch.float32 if levels.output is None else torch.uint8
            bias = levels.bias(bias, k, add)
        line = None if bias is None else self._layout((k,), torch.float32, _LINE)
        attributes, fixed, kept = self._attributes(relu, add, levels, groups)
        description = self._described(
            self._library.convolution_forward_primitive_desc_create, self._library.engine, _INFERENCE, _DIRECT,
            self._activation(shape, read), self._layout(filters, weight.dtype, _ANY), line,
            self._activation(output, written), dimensions([stride, stride]), dimensions([0, 0]),
            dimensions([padding, padding]), dimensions(after), attributes,
        )  # fmt: skip
        packed = self._packed(description, self._layout(filters, weight.dtype, plain), weight, known)
        return self._weighted(description, packed, bias, fixed, kept)

    def product(
        self, rows: int, weight: Tensor, bias: Tensor | None, known: list[Packed], levels: Levels | None = None
    ) -> Operation:
        """Build ``x · weightᵀ`` (+ bias) in float32, for ``rows`` of ``x`` and a ``weight`` ``[K, C]``, as above."""
        k, c = weight.shape
        line = None if bias is None else self._layout((k,), torch.float32, _LINE)
        attributes, fixed, kept = self._attributes(levels=levels)
        description = self._described(
            self._library.inner_product_forward_primitive_desc_create, self._library.engine, _INFERENCE,
            self._layout((rows, c), weight.dtype if levels is None else torch.uint8, _ROWS),
            self._layout((k, c), weight.dtype, _ANY), line,
            self._layout((rows, k), torch.float32, _ROWS), attributes,
        )  # fmt: skip
        packed = self._packed(description, self._layout((k, c), weight.dtype, _ROWS), weight, known)
        return self._weighted(description, packed, bias, fixed, kept)

    def pool(
        self,
        shape: Shape,
        output: Shape,
        mode: str,
        dtype: torch.dtype,
        *,
        kernel: Shape,
        stride: int,
        padding: int = 0,
    ) -> Operation:
        """Build a pool; ``mode`` is ``"max"`` or ``"average"``, of the pixels inside the image."""
        after = [
            (out - 1) * stride + size - padding - inside
            for out, size, inside in zip(output[1:3], kernel, shape[1:3], strict=True)
        ]
        attributes, *_ = self._attributes()
        description = self._described(
            self._library.pooling_forward_primitive_desc_create, self._library.engine, _INFERENCE, _POOLS[mode],
            self._activation(shape, dtype), self._activation(output, dtype), dimensions([stride, stride]),
            dimensions(kernel), dimensions([0, 0]), dimensions([padding, padding]), dimensions(after), attributes,
        )  # fmt: skip
        return self._operation(description, None, [], [])

    def averages(self, shape: Shape, dtype: torch.dtype, scale: float = 1.0) -> Operation:
        """Build the averages ``[N, C]`` of images: of numbers, in ``dtype``; of levels of ``scale``, in float32.

        oneDNN's pools of levels give levels. Exact sums come from a convolution of each channel with ones.
        """
        n, h, w, c = shape
        output = (n, 1, 1, c)
        if dtype != torch.uint8:
            return self.pool(shape, output, "average", dtype, kernel=(h, w), stride=1)
        ones = torch.ones((c, h, w, 1), dtype=torch.int8, device="cpu")
        return self.convolution(shape, output, ones, None, known=[], groups=c, levels=Levels(scale / (h * w), None))

    def sums(self, rows: int, columns: int, dtype: torch.dtype) -> Operation:
        """Build the sums ``[rows]`` in float32 of a matrix ``[rows, columns]``: its product with ones."""
        ones = torch.ones((1, columns), dtype=dtype, device="cpu")
        return self.product(rows, ones, None, known=[])

    def images(self, shape: Shape, read: tuple[torch.dtype, bool], written: tuple[torch.dtype, bool]) -> Operation:
        """Build the copy of images from one dtype and format to another: channels-last if true, else contiguous."""
        n, h, w, c = shape
        attributes, *_ = self._attributes()
        source, destination = (
            self._layout((n, c, h, w), dtype, _CHANNELS_LAST if channels_last else _PLANES)
            for dtype, channels_last in (read, written)
        )
        return self._operation(self._reorder(source, destination, attributes), None, [], [])

    def pixels(self, shape: Shape, scales: Tensor, shifts: Tensor) -> Operation:
        """Build ``x · scales + shifts`` of float32 images, rounded to levels; both are ``[C]``, in float32.

        Images and levels are contiguous: one channel after another.
        """
        n, h, w, c = shape
        library = self._library
        channels = self._layout((1, c, 1, 1), torch.float32, _PLANES)
        attributes, *_ = self._attributes()
        after = Owned(library.created(library.post_ops_create), library.post_ops_destroy)
        library.post_ops_append_binary(after, _ADDED, channels)
        library.primitive_attr_set_post_ops(attributes, after)
        source, levels = (self._layout((n, c, h, w), dtype, _PLANES) for dtype in (torch.float32, torch.uint8))
        description = self._described(
            library.binary_primitive_desc_create, library.engine, _MULTIPLIED, source, channels, levels, attributes
        )
        kept: list[object] = [scales, shifts]
        fixed = [
            (FACTORS, self._memory(channels, scales.data_ptr())),
            (self._post_operand(description), self._memory(channels, shifts.data_ptr())),
        ]
        return self._operation(description, None, fixed, kept)

    def bordered(self, shape: Shape, padding: int) -> Operation:
        """Build the copy of contiguous levels, one channel after another, into a channels-last picture with a border.

        The destination begins at the first pixel inside the border.
        """
        n, h, w, c = shape
        strides = [(h + 2 * padding) * (w + 2 * padding) * c, 1, (w + 2 * padding) * c, c]
        library = self._library
        source = self._layout((n, c, h, w), torch.uint8, _PLANES)
        made = library.created(
            library.memory_desc_create_with_strides, 4, dimensions((n, c, h, w)), _DTYPES[torch.uint8],
            dimensions(strides),
        )  # fmt: skip
        inside = Owned(made, library.memory_desc_destroy)
        attributes, *_ = self._attributes()
        return self._operation(self._reorder(source, inside, attributes), None, [], [])

    def levels(self, rows: int, channels: int, scale: float) -> Operation:
        """Build the rounding of float32 ``[rows, channels]`` to levels of ``scale``."""
        attributes, *_ = self._attributes()
        self._library.primitive_attr_set_scales_mask(attributes, SOURCE, 0)
        kept: list[object] = []
        inverse = self._vector(torch.tensor([1 / scale], dtype=torch.float32, device="cpu"), kept)
        source, levels = (self._layout((rows, channels), dtype, _ROWS) for dtype in (torch.float32, torch.uint8))
        return self._operation(self._reorder(source, levels, attributes), None, [(SCALES | SOURCE, inverse)], kept)

    def _weighted(
        self, description: Owned, packed: Packed, bias: Tensor | None, fixed: list[tuple[int, Owned]],
        kept: list[object],
    ) -> Operation:  # fmt: skip
        place = self._memory(packed.layout, 0)
        self._unaddressed.append((packed, place))
        fixed = [*fixed, (WEIGHTS, place)]
        if bias is not None:
            fixed.append((BIAS, self._vector(bias.to(torch.float32).contiguous(), kept)))
        return self._operation(description, packed, fixed, kept)

    def _operation(
        self, description: Owned, packed: Packed | None, fixed: list[tuple[int, Owned]], kept: list[object]
    ) -> Operation:
        library = self._library
        primitive = Owned(library.created(library.primitive_create, description), library.primitive_destroy)
        scratchpad = self._queried(description, _QUERY_SCRATCHPAD)
        return Operation(
            primitive,
            self._queried(description, _QUERY_SOURCE),
            self._queried(description, _QUERY_DESTINATION),
            scratchpad,
            library.memory_desc_get_size(scratchpad),
            packed,
            fixed,
            kept,
            self._implementation(description),
        )

    def _attributes(
        self, relu: bool = False, add: bool = False, levels: Levels | None = None, groups: int = 1
    ) -> tuple[Owned, list[tuple[int, Owned]], list[object]]:
        """Return a primitive's attributes, the arguments that they need, and what must live as long."""
        # The scale of the output is part of the weights', of the bias and of the residual's, and the zero points of the
        # bias: each would be one more operation for every number that is stored.
        library = self._library
        after = Owned(library.created(library.post_ops_create), library.post_ops_destroy)
        attributes = Owned(library.created(library.primitive_attr_create), library.primitive_attr_destroy)
        library.primitive_attr_set_scratchpad_mode(attributes, _USER_SCRATCHPAD)
        if add:
            library.post_ops_append_sum(after, 1.0 if levels is None else levels.residual / levels.unit, 0, 0)
        if relu and not (levels is not None and levels.clips_at_zero):
            library.post_ops_append_eltwise(after, _RELU, 0.0, 0.0)
        library.primitive_attr_set_post_ops(attributes, after)
        fixed: list[tuple[int, Owned]] = []
        kept: list[object] = []
        if levels is None:
            return attributes, fixed, kept
        every = 1 if groups == 1 else 3  # a mask: one scale for each index of the first dimension, or of the first two
        scale = levels.input / levels.unit
        if levels.weights is None:
            argument, mask, values = SOURCE, 0, torch.tensor([scale], dtype=torch.float32, device="cpu")
        else:
            argument, mask, values = WEIGHTS, every, (levels.weights.double() * scale).to(torch.float32)
        library.primitive_attr_set_scales_mask(attributes, argument, mask)
        fixed.append((SCALES | argument, self._vector(values.contiguous(), kept)))
        return attributes, fixed, kept

    def _packed(self, description: Owned, plain: Owned, weight: Tensor, known: list[Packed]) -> Packed:
        """Return ``weight`` in the layout of the primitive: one of the ``known`` ones, or a new one."""
        library = self._library
        layout = self._queried(description, _QUERY_WEIGHTS)
        for packed in (*known, *(new for new, *_, owner in self._unpacked if owner is known)):
            if library.memory_desc_equal(packed.layout, layout):
                return packed
        packed = Packed(layout, aligned(0))
        self._unpacked.append((packed, plain, weight.contiguous(), known))
        return packed

    def _reorder(self, source: Owned, destination: Owned, attributes: Owned | None) -> Owned:
        library = self._library
        return self._described(
            library.reorder_primitive_desc_create, source, library.engine, destination, library.engine, attributes
        )

    def _activation(self, shape: Shape, dtype: torch.dtype) -> Owned:
        n, h, w, c = shape
        if self._block is None:
            return self._layout((n, c, h, w), dtype, _CHANNELS_LAST)
        return self._layout((n, c, h, w), dtype, _PLANES if c % self._block else _BLOCKED[self._block])

    def _layout(self, shape: Sequence[int], dtype: torch.dtype, tag: int) -> Owned:
        library = self._library
        made = library.created(library.memory_desc_create_with_tag, len(shape), dimensions(shape), _DTYPES[dtype], tag)
        return Owned(made, library.memory_desc_destroy)

    def _queried(self, description: Owned, what: int) -> Owned:
        """Return a copy of one of the layouts of a primitive."""
        library = self._library
        layout = library.primitive_desc_query_md(description, what, 0)
        return Owned(library.created(library.memory_desc_clone, layout), library.memory_desc_destroy)

    def _post_operand(self, description: Owned) -> int:
        """Return the argument for the second operand of a primitive's first post-operation: versions differ in it."""
        library = self._library
        for base in _POST_OPERATIONS:
            layout = library.primitive_desc_query_md(description, _QUERY_ARGUMENT, base | FACTORS)
            if layout and library.memory_desc_get_size(layout):
                return base | FACTORS
        raise OneDnnError(
            f"oneDNN {library.number} has another interface than fastres knows. Set FASTRES_WITHOUT=primitives to go "
            "through torch's operators, and report this"
        )

    def _implementation(self, description: Owned) -> str:
        name = c_char_p()
        self._library.primitive_desc_query(description, _QUERY_IMPLEMENTATION, 0, byref(name))
        return (name.value or b"").decode()

    def _described(self, create: Callable[..., None], *arguments: object) -> Owned:
        return Owned(self._library.created(create, *arguments), self._library.primitive_desc_destroy)

    def _vector(self, values: Tensor, kept: list[object]) -> Owned:
        kept.append(values)
        return self._memory(self._layout(values.shape, values.dtype, _LINE), values.data_ptr())

    def _memory(self, layout: Owned, address: int) -> Owned:
        return memory(self._library, layout, address)
