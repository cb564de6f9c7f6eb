"""What a plan in 8 bit has beyond the steps: the scales of its values and weights.

All values in 8 bit are uint8 and stand for ``scale · (q − zero_point)``, with one scale for the whole tensor. The zero
point is 0 for every value that ReLU has made non-negative, so that no level is wasted on negative numbers. Weights are
int8, symmetric, with one scale for each output channel: a weight stands for ``scale[k] · q``.

A step is computed in 8 bit if it has weight scales; its weight is then int8. Any other step is computed in float32, as
in a float plan. A value is in 8 bit if it has a scale, and float32 otherwise. :func:`fastres.kernels.reference` defines
the arithmetic of each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

LARGEST = 255  # of the levels of a value
# The largest weight. On processors without VNNI instructions, two products are added in 16 bits: 2 · 255 · 64 fits.
WEIGHT_LIMIT, WEIGHT_LIMIT_WITHOUT_VNNI = 127, 64


@dataclass(frozen=True)
class Scale:
    """The levels of a value in 8 bit: level ``q`` (0 … 255) stands for ``scale · (q − zero_point)``.

    ``scale`` is rounded to float32, which is what executors and files compute with.
    """

    scale: float
    zero_point: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(np.float32(self.scale)))

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest number that the levels can express."""
        return -self.scale * self.zero_point, self.scale * (LARGEST - self.zero_point)


@dataclass(frozen=True, eq=False)
class Quantisation:
    """The scales of a plan in 8 bit.

    ``values`` has the scale of each value in 8 bit, by the value's name; ``weights`` the float32 scales ``[K]`` of each
    step that is computed in 8 bit, by the step's name. ``"input"`` and ``"pooled"`` are values too: pixels have scale
    1, and the pooled features are rounded to 8 bit before a classifier in 8 bit.

    ``branches`` is for engines that add residuals in 8 bit: by a convolution's name, the scale of its result before the
    addition (:mod:`fastres.quantisation.branches`). The reference does not round there. It may lack steps.
    """

    values: Mapping[str, Scale]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    branches: Mapping[str, Scale] = field(default_factory=dict)
