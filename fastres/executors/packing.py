"""Weights packed into the layouts that oneDNN prefers, kept for the image shapes of recent calls."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastres.forks import Guard
from fastres.network.plan import Shape

from .recent import Recent

# Number of image shapes whose packed weights are kept, as long as these take at most COPIES_KEPT times the memory of
# the plan's own weights. Shapes with the same oneDNN layout share a packed copy, so most shapes take a few kilobytes.
SHAPES_KEPT, COPIES_KEPT = 1024, 4


class Packed(Protocol):
    """A step with its weight in oneDNN's layout for one input shape."""

    @property
    def weight(self) -> Tensor: ...


Step = TypeVar("Step", bound=Packed)


class Packings(Generic[Step]):
    """The packed steps of a plan, by the shape of the images.

    ``pack`` packs every step for images of a shape (NHWC); ``plan_bytes`` is the memory of the plan's own weights.
    """

    def __init__(self, pack: Callable[[Shape], dict[str, Step]], plan_bytes: int) -> None:
        self._pack = pack
        self.most_bytes = COPIES_KEPT * plan_bytes
        self.kept: Recent[tuple[Shape, int], dict[str, Step]] = Recent(SHAPES_KEPT)
        self._guard = Guard()

    def of(self, shape: Shape) -> dict[str, Step]:
        """Return the steps packed for images of ``shape``, by name. The first call with a shape packs them."""
        # oneDNN's layouts also depend on the number of threads. With another number it would reorder at every call.
        key = (shape, torch.get_num_threads())
        with self._guard:
            known = key in self.kept
            packed = self.kept.get_or_make(key, lambda: self._shared(self._pack(shape)))
            while not known and len(self.kept) > 1 and self._bytes_kept() > self.most_bytes:
                self.kept.popitem(last=False)
            return packed

    def _shared(self, packed: dict[str, Step]) -> dict[str, Step]:
        """Replace each step by an equal one of another shape if one is kept. Most shapes share most layouts."""
        return {name: self._known(name, step) for name, step in packed.items()}

    def _known(self, name: str, step: Step) -> Step:
        data = _packed_bytes(step.weight)
        distinct = {id(packed[name]): packed[name] for packed in self.kept.values()}
        return next((kept for kept in distinct.values() if np.array_equal(_packed_bytes(kept.weight), data)), step)

    def _bytes_kept(self) -> int:
        """Return the memory of all packed weights, in bytes."""
        distinct = {id(step): step for packed in self.kept.values() for step in packed.values()}
        return sum(torch.ops.mkldnn._nbytes(step.weight) for step in distinct.values())


def _packed_bytes(weight: Tensor) -> np.ndarray:
    """Return the memory of a packed weight, without a copy. Equal bytes of the same weight mean an equal layout."""
    size = torch.ops.mkldnn._nbytes(weight)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(torch.ops.mkldnn.data_ptr(weight)))
