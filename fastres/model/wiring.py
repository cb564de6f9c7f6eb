"""What a ResNet computes, as a graph of values, to compare with what a module computes.

A value is an operation with its operands and settings, for example ``("relu", 17)``, and gets a number the first time
that it occurs. Equal numbers therefore mean the same computation on the same tensors, whatever code ran it. Sums and
products do not depend on the order of their operands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastres.folding.build import BATCH_NORM_EPSILON
from fastres.network.architectures import NORM_PARTS, Architecture, ConvSpec
from fastres.network.plan import LOGITS, POOLED

from . import unfolded


@dataclass
class Values:
    """Numbers of values. Parameters are told apart by the identity of their tensors, so shared ones are equal."""

    _numbers: dict[tuple[Any, ...], int] = field(default_factory=dict)
    _closed: int = 0

    def number(self, operation: str, *operands: Any) -> int:
        if operation in ("add", "mul"):
            operands = tuple(sorted(operands))
        return self._numbers.setdefault((operation, *operands), len(self._numbers))

    def known(self, value: int) -> bool:
        """Return True if ``value`` is among the values that existed when :meth:`close` was called."""
        return value < self._closed

    def close(self) -> None:
        """Declare that all values of the network exist."""
        self._closed = len(self._numbers)

    def image(self) -> int:
        return self.number("image")

    def parameter(self, tensor: Tensor) -> int:
        return self.number("parameter", id(tensor))


def network(arch: Architecture, state: Mapping[str, Tensor], values: Values) -> dict[str, int]:
    """Return the numbers of the values that ``arch`` computes, by their names in the plan; closes ``values``.

    ``state`` has the module's own tensors under torchvision's names. Without a classifier, ``logits`` are ``pooled``.
    """
    found = unfolded.run(arch, values.image(), _Numbers(state, values))
    found.setdefault(LOGITS, found[POOLED])
    values.close()
    return found


class _Numbers:
    """The operations on numbers of values."""

    def __init__(self, state: Mapping[str, Tensor], values: Values) -> None:
        self.state = state
        self.number = values.number
        self.parameter = values.parameter

    def tensor(self, name: str) -> int:
        return self.parameter(self.state[name])

    def conv_norm(self, x: int, spec: ConvSpec) -> int:
        weight = self.tensor(f"{spec.conv}.weight")
        stride, padding = (spec.stride,) * 2, (spec.padding,) * 2
        y = self.number("conv", x, weight, None, stride, padding, (1, 1), spec.groups)
        parts = (self.tensor(f"{spec.norm}.{part}") for part in NORM_PARTS)
        return self.number("norm", y, *parts, BATCH_NORM_EPSILON)

    def pointwise(self, x: int, name: str) -> int:
        weight, bias = (self.tensor(f"{name}.{part}") for part in ("weight", "bias"))
        return self.number("conv", x, weight, bias, (1, 1), (0, 0), (1, 1), 1)

    def relu(self, x: int) -> int:
        return self.number("relu", x)

    def sigmoid(self, x: int) -> int:
        return self.number("sigmoid", x)

    def add(self, a: int, b: int) -> int:
        return self.number("add", a, b)

    def multiply(self, a: int, b: int) -> int:
        return self.number("mul", a, b)

    def max_pool(self, x: int) -> int:
        return self.number("max_pool", x, (3, 3), (2, 2), (1, 1))

    def average_pool(self, x: int) -> int:
        return self.number("average_pool", x, (2, 2), (2, 2), (0, 0), True, False)

    def mean(self, x: int) -> int:
        return self.number("mean", x)

    def subsample(self, x: int, stride: int) -> int:
        for dimension in (2, 3) if stride != 1 else ():
            x = self.number("slice", x, dimension, stride)
        return x

    def pad_channels(self, x: int, before: int, after: int) -> int:
        return self.number("pad", x, before, after)

    def classifier(self, x: int) -> int:
        weight = self.number("transposed", self.tensor("fc.weight"))
        return self.number("linear", x, weight, self.tensor("fc.bias"))
