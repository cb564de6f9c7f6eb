"""Memory that the processes of a server share: one slot for each image that is being answered.

A decoder writes the pixels into the slot, a model process reads them there and writes the result beside them. So
neither goes through a queue. The memory has no name (``memfd_create``) and does not lie in ``/dev/shm``, which has
64 MB in a Docker container.
"""

from __future__ import annotations

import mmap
import os
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT = 64


class Arena:
    """``slots`` slots: pixels uint8 ``[crop, crop, 3]``, scores float32 ``[classes]``, embedding ``[features]``.

    It can be sent to a process that is being started, which then shares the memory.
    """

    def __init__(self, slots: int, crop: int, classes: int, features: int, descriptor: int | None = None) -> None:
        self.slots, self.crop, self.classes, self.features = slots, crop, classes, features
        self._row = -(-(crop * crop * 3 + 4 * (classes + features)) // _ALIGNMENT) * _ALIGNMENT
        size = slots * self._row
        if descriptor is None:
            descriptor = os.memfd_create("fastres-serve", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, size)
        self._descriptor = descriptor
        self._memory = np.frombuffer(mmap.mmap(descriptor, size), np.uint8).reshape(slots, self._row)

    def pixels(self, slot: int) -> NDArray[np.uint8]:
        """Return the pixels of a slot, RGB, uint8 ``[crop, crop, 3]``; writing to them changes the slot."""
        return self._memory[slot, : self.crop * self.crop * 3].reshape(self.crop, self.crop, 3)

    def scores(self, slot: int) -> NDArray[np.float32]:
        """Return the softmax probabilities of a slot, float32 ``[classes]``."""
        return self._floats(slot)[: self.classes]

    def embedding(self, slot: int) -> NDArray[np.float32]:
        """Return the pooled features of a slot, float32 ``[features]``."""
        return self._floats(slot)[self.classes : self.classes + self.features]

    def _floats(self, slot: int) -> NDArray[np.float32]:
        begin = self.crop * self.crop * 3
        return self._memory[slot, begin : begin + 4 * (self.classes + self.features)].view(np.float32)

    def __reduce__(self) -> tuple[Any, ...]:
        sizes = self.slots, self.crop, self.classes, self.features
        return _opened, (*sizes, DupFd(self._descriptor))

    def __del__(self) -> None:
        os.close(self._descriptor)


def _opened(slots: int, crop: int, classes: int, features: int, sent: Any) -> Arena:
    return Arena(slots, crop, classes, features, sent.detach())
