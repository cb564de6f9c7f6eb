"""Batches of pixels, and their way from a worker process to the main one: memory that both share.

A worker writes pixels into memory without a name (``memfd_create``) and sends the file descriptor. Unlike the shared
memory of PyTorch, it does not lie in ``/dev/shm``, which has 64 MB in a Docker container, too little for a few batches.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .columns import Columns


@dataclass(frozen=True)
class Batch:
    """The images from ``start`` on: their identity, pixels and errors.

    ``pixels`` are raw RGB, uint8 ``[N, 3, crop, crop]``, channels-last. ``errors`` has a message or ``None`` for each
    image. An image with an error is black.
    """

    start: int
    identity: Columns
    pixels: Tensor
    errors: tuple[str | None, ...]

    def pin_memory(self) -> Batch:
        """Return the batch with pixels in page-locked memory, for asynchronous copies; the DataLoader calls this."""
        return replace(self, pixels=self.pixels.pin_memory())


def black(count: int, crop: int) -> Tensor:
    """Return ``count`` black images, uint8 ``[N, 3, crop, crop]``, channels-last."""
    return torch.zeros(count, crop, crop, 3, dtype=torch.uint8, device="cpu").permute(0, 3, 1, 2)


def padded(batch: Tensor, count: int) -> Tensor:
    """Return ``batch`` with zeros behind it, ``count`` images in all: kernels and graphs exist for the full size."""
    lacking = count - len(batch)
    return functional.pad(batch, (0, 0, 0, 0, 0, 0, 0, lacking)) if lacking > 0 else batch


class Parcel:
    """A batch in memory that the process which unpickles it shares; it unpickles as a :class:`Batch`.

    ``fill`` gets the black ``pixels`` and returns identity and errors.
    """

    def __init__(
        self, start: int, count: int, crop: int, fill: Callable[[Tensor], tuple[Columns, tuple[str | None, ...]]]
    ) -> None:
        self._shape = count, crop, crop, 3
        self._descriptor = os.memfd_create("fastres", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, count * crop * crop * 3)
        self._start = start
        self._identity, self._errors = fill(_mapped(self._descriptor, self._shape))

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self._start, self._identity, self._errors, self._shape, DupFd(self._descriptor))

    def __del__(self) -> None:
        os.close(self._descriptor)


def can_share() -> bool:
    """Return True if this system has memory that :class:`Parcel` needs."""
    return hasattr(os, "memfd_create")


def _mapped(descriptor: int, shape: tuple[int, ...]) -> Tensor:
    size = os.fstat(descriptor).st_size
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8).view(shape).permute(0, 3, 1, 2)


def _opened(start: int, identity: Columns, errors: tuple[str | None, ...], shape: tuple[int, ...], sent: Any) -> Batch:
    descriptor = sent.detach()
    try:
        return Batch(start, identity, _mapped(descriptor, shape), errors)
    finally:
        os.close(descriptor)
