"""The unfolded network: which operations a ResNet runs, in order, as torchvision and timm run them.

:func:`run` walks through them. What an operation does is up to the caller: :mod:`fastres.model.plain` computes tensors,
and :mod:`fastres.model.wiring` numbers values to compare them with those of a module.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from fastres.network.architectures import Architecture, BlockSpec, ConvSpec, block_specs, stem_specs
from fastres.network.plan import LOGITS, POOLED

Value = TypeVar("Value")


class Operations(Protocol[Value]):
    """The operations of a ResNet. ``mean`` is over the pixels of each channel and gives one pixel."""

    def conv_norm(self, x: Value, spec: ConvSpec) -> Value: ...
    def pointwise(self, x: Value, name: str) -> Value:
        """A 1×1 convolution with a bias, whose parameters begin with ``name``."""
        ...

    def relu(self, x: Value) -> Value: ...
    def sigmoid(self, x: Value) -> Value: ...
    def add(self, a: Value, b: Value) -> Value: ...
    def multiply(self, a: Value, b: Value) -> Value: ...
    def max_pool(self, x: Value) -> Value: ...
    def average_pool(self, x: Value) -> Value: ...
    def mean(self, x: Value) -> Value: ...
    def subsample(self, x: Value, stride: int) -> Value: ...
    def pad_channels(self, x: Value, before: int, after: int) -> Value: ...
    def classifier(self, x: Value) -> Value: ...


def run(arch: Architecture, image: Value, do: Operations[Value]) -> dict[str, Value]:
    """Run ``arch`` on ``image`` with the operations ``do``; return the values of the plan that lie between blocks."""
    value = image
    for spec in stem_specs(arch):
        value = do.relu(do.conv_norm(value, spec))
    values = {"stem": value if arch.stem == "cifar" else do.max_pool(value)}
    value = values["stem"]
    for block in block_specs(arch):
        value = values[block.name] = _block(arch, block, value, do)
    values[POOLED] = do.mean(value)
    if arch.num_classes:
        values[LOGITS] = do.classifier(values[POOLED])
    return values


def _block(arch: Architecture, block: BlockSpec, x: Value, do: Operations[Value]) -> Value:
    first, *others = block.convs
    y = do.conv_norm(x, first)
    for spec in others:
        y = do.conv_norm(do.relu(y), spec)
    if block.squeezed:
        squeezed = do.relu(do.pointwise(do.mean(y), f"{block.name}.se.fc1"))
        y = do.multiply(y, do.sigmoid(do.pointwise(squeezed, f"{block.name}.se.fc2")))
    return do.relu(do.add(y, _shortcut(block, x, do)) if arch.skip else y)


def _shortcut(block: BlockSpec, x: Value, do: Operations[Value]) -> Value:
    if block.pools:
        x = do.average_pool(x)
    if block.projection is not None:
        return do.conv_norm(x, block.projection)
    if not block.pad:
        return x
    before = (block.out_channels - block.in_channels) // 2  # as in fastres.folding.build.pad_shortcut_weight
    return do.pad_channels(do.subsample(x, block.stride), before, block.out_channels - block.in_channels - before)
