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
from fastres.network.architectures import NORM_PARTS, Architecture, BlockSpec, ConvSpec, block_specs, stem_specs
from fastres.network.plan import LOGITS, POOLED


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
    builder = _Builder(state, values)
    found = {"stem": builder.stem(arch)}
    value = found["stem"]
    for block in block_specs(arch):
        value = found[block.name] = builder.block(arch, block, value)
    found[POOLED] = found[LOGITS] = values.number("mean", value)
    if arch.num_classes:
        weight = values.number("transposed", builder.tensor("fc.weight"))
        found[LOGITS] = values.number("linear", found[POOLED], weight, builder.tensor("fc.bias"))
    values.close()
    return found


@dataclass
class _Builder:
    state: Mapping[str, Tensor]
    values: Values

    def tensor(self, name: str) -> int:
        return self.values.parameter(self.state[name])

    def conv(self, spec: ConvSpec, x: int) -> int:
        """Return the value of a convolution and its batch norm."""
        weight = self.tensor(f"{spec.conv}.weight")
        stride, padding = (spec.stride,) * 2, (spec.padding,) * 2
        y = self.values.number("conv", x, weight, None, stride, padding, (1, 1), spec.groups)
        parts = (self.tensor(f"{spec.norm}.{part}") for part in NORM_PARTS)
        return self.values.number("norm", y, *parts, BATCH_NORM_EPSILON)

    def relu(self, x: int) -> int:
        return self.values.number("relu", x)

    def stem(self, arch: Architecture) -> int:
        value = self.values.image()
        for spec in stem_specs(arch):
            value = self.relu(self.conv(spec, value))
        return value if arch.stem == "cifar" else self.values.number("max_pool", value, (3, 3), (2, 2), (1, 1))

    def block(self, arch: Architecture, block: BlockSpec, x: int) -> int:
        y = x
        for spec in block.convs:
            y = self.conv(spec, y if spec is block.convs[0] else self.relu(y))
        if block.squeezed:
            y = self.values.number("mul", y, self.gate(block, y))
        return self.relu(self.values.number("add", y, self.shortcut(block, x)) if arch.skip else y)

    def gate(self, block: BlockSpec, x: int) -> int:
        value = self.values.number("mean", x)
        for layer in ("fc1", "fc2"):
            weight, bias = (self.tensor(f"{block.name}.se.{layer}.{part}") for part in ("weight", "bias"))
            value = self.values.number("conv", value, weight, bias, (1, 1), (0, 0), (1, 1), 1)
            value = self.relu(value) if layer == "fc1" else self.values.number("sigmoid", value)
        return value

    def shortcut(self, block: BlockSpec, x: int) -> int:
        if block.pools:
            x = self.values.number("average_pool", x, (2, 2), (2, 2), (0, 0), True, False)
        if block.projection is not None:
            return self.conv(block.projection, x)
        if not block.pad:
            return x
        if block.stride != 1:
            for dimension in (2, 3):
                x = self.values.number("slice", x, dimension, block.stride)
        before = (block.out_channels - block.in_channels) // 2
        return self.values.number("pad", x, before, block.out_channels - block.in_channels - before)
