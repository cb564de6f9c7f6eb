"""The images of a call, on oneDNN's primitives: their copy to the form in which a stem reads them, and a check of them.

After a call, the processor's caches hold neither torch's code nor the images. A primitive touches much less code than
one of torch's operators, and takes a fraction of its time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import c_float
from typing import Protocol

import torch
from torch import Tensor

from fastres.network.plan import Shape
from fastres.onednn.objects import aligned
from fastres.onednn.primitives import Builder

from .binding import Binder

_COPIED = (torch.float32, torch.bfloat16, torch.float16)


class Preparer(Protocol):
    """Prepares images on torch's operators."""

    def normalised(self, x: Tensor) -> Tensor:
        """Return uint8 pixels ``[N, 3, H, W]`` as normalised float32 images in the same memory format."""

    def prepare(self, x: Tensor, memory_format: torch.memory_format) -> Tensor:
        """Return images ``x`` in the dtype that the first step reads, and in ``memory_format``."""


class Reader:
    """Reads images of ``shape`` (NHWC) in a form: a dtype and a memory format. One thread uses it at a time.

    ``place`` is the memory for images that are given in another form, a dense tensor ``[N, C, H, W]`` in this form.
    Without one, images stay as they are given.
    """

    def __init__(self, binder: Binder, shape: Shape, place: Tensor | None) -> None:
        self._binder, self._builder, self._shape, self._place = binder, Builder(binder.library), shape, place
        self._summed = {torch.float32, torch.float32 if place is None else place.dtype}
        self._copies: dict[tuple[torch.dtype, bool], Callable[[int], None] | None] = {}
        self._sums: dict[torch.dtype, Callable[[int], float]] = {}

    def read(self, x: Tensor, owner: Preparer) -> Tensor:
        """Return ``x`` in the form: itself, or a copy. ``owner`` copies what oneDNN cannot."""
        place = self._place
        if place is None:
            return x
        if x.dtype == torch.uint8:
            x = owner.normalised(x)
        memory_format = torch.channels_last if _is_channels_last(place) else torch.contiguous_format
        if x.dtype == place.dtype and x.is_contiguous(memory_format=memory_format):
            return x
        given = _is_channels_last(x)
        if given is None or x.dtype not in _COPIED:
            return owner.prepare(x, memory_format)
        key = (x.dtype, given)
        if key not in self._copies:
            self._copies[key] = self._copy(key, place)
        copy = self._copies[key]
        if copy is None:
            return owner.prepare(x, memory_format)
        copy(x.data_ptr())
        return place

    def guard(self, x: Tensor) -> Tensor | None:
        """Return 0 for each image of ``x`` that is finite, and NaN for the others; ``None`` if all are."""
        if x.dtype in self._summed and _is_channels_last(x) is not None:
            if x.dtype not in self._sums:
                self._sums[x.dtype] = self._sum(x.dtype)
            if math.isfinite(self._sums[x.dtype](x.data_ptr())):
                return None
        return guard_of(x)

    def _copy(self, form: tuple[torch.dtype, bool], place: Tensor) -> Callable[[int], None] | None:
        """Return a function that copies images at an address to ``place``; ``None`` if oneDNN has no fast one."""
        binder = self._binder
        operation = self._builder.images(self._shape, form, (place.dtype, bool(_is_channels_last(place))))
        if operation.is_slow:
            return None
        source, destination = binder.memories(operation, destination=place.data_ptr())
        run = binder.routine([binder.bound(operation, source, destination, own_scratchpad=True)])

        def copy(address: int) -> None:
            binder.library.memory_set_data_handle(source, address)
            run()

        return copy

    def _sum(self, dtype: torch.dtype) -> Callable[[int], float]:
        """Return a function that sums the images at an address."""
        binder = self._binder
        n, h, w, c = self._shape
        rows = n * h
        first, second = self._builder.sums(rows, w * c, dtype), self._builder.sums(1, rows, torch.float32)
        self._builder.pack()
        of_rows, total = aligned(4 * rows), aligned(4)
        source, written = binder.memories(first, destination=of_rows.data_ptr())
        sum_each_row = binder.bound(first, source, written, own_scratchpad=True)
        ends = binder.memories(second, of_rows.data_ptr(), total.data_ptr())
        sum_all = binder.routine([sum_each_row, binder.bound(second, *ends, own_scratchpad=True)])
        binder.kept += (of_rows, total)
        value = c_float.from_address(total.data_ptr())

        def sum_of(address: int) -> float:
            binder.library.memory_set_data_handle(source, address)
            sum_all()
            return value.value

        return sum_of


def guard_of(x: Tensor) -> Tensor | None:
    """Return 0 for each image of ``x`` that is finite, and NaN for the others; ``None`` if all are.

    The sum of the whole batch is much faster than those of its images.
    """
    return None if math.isfinite(x.sum()) else x.sum((1, 2, 3), dtype=torch.float32) * 0


def _is_channels_last(x: Tensor) -> bool | None:
    """Return True for dense channels-last images, False for contiguous ones, ``None`` for all others."""
    if x.is_contiguous():
        return False
    return True if x.is_contiguous(memory_format=torch.channels_last) else None
