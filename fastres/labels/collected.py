"""Labels of many images in little memory: each distinct label is kept once, with the place where it first occurs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

NONE = -1


class Collected:
    """The labels of ``count`` images. A label is an int or a text; an image without one has ``NONE``."""

    def __init__(self, count: int) -> None:
        self.codes = np.full(count, NONE, np.int64)
        self.places: dict[int | str, str] = {}
        self._code: dict[int | str, int] = {}

    def set(self, row: int, label: int | str, place: Callable[[], str]) -> None:
        """Store the label of image ``row``; ``place`` describes where it is, and is called once for each label."""
        code = self._code.get(label)
        if code is None:
            code = self._code[label] = len(self._code)
            self.places[label] = place()
        self.codes[row] = code

    def indices(self, index: Mapping[Any, int]) -> np.ndarray:
        """Return the class of each image, int64 ``[N]``, with ``NONE`` where it has none, or ``index`` has none."""
        classes = [index.get(label, NONE) for label in self._code]
        return np.array([*classes, NONE], np.int64)[self.codes]
