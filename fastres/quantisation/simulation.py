"""Runs a plan step by step in float32, rounded where a plan in 8 bit rounds.

Calibration needs pieces that no executor offers: one step alone, a convolution before its ReLU, a step in 8 bit inside
a float network. The simulation multiplies what the levels stand for instead of the levels. Its results are those of
:mod:`fastres.executors.reference`, except where a sum in float32 is rounded to the neighbouring level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastres.executors import cpu
from fastres.network.plan import INPUT, LOGITS, POOLED, Conv, Head, Plan, Pool, SqueezeExcite, Stem, Step
from fastres.network.quantisation import LARGEST, Scale


class Simulation:
    """Runs ``plan``, in float32 or in 8 bit. Activations are float32, channels-last ``[N, C, H, W]``."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        quantisation = plan.quantisation
        self._scales = {} if quantisation is None else quantisation.values
        self._weight_scales = {} if quantisation is None else quantisation.weights
        self._weights = {step.name: self._weight(step) for step in plan if isinstance(step, (Stem, Conv, Head))}
        self._last_reads = plan.last_reads()

    def run(self, x: Tensor, outputs: Sequence[str] = (LOGITS,)) -> list[Tensor]:
        """Run uint8 pixels ``x`` ``[N, 3, H, W]``; return the values named in ``outputs``, as executors do."""
        kept: dict[str, Tensor] = {}
        for values in self.walk(x):
            kept.update((name, values[name]) for name in outputs if name in values)
            if len(kept) == len(set(outputs)):
                break
        return [kept[name] for name in outputs]

    def walk(self, x: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield the values that each step writes. A value is forgotten after the last step that reads it."""
        values = {INPUT: x}
        for index, step in enumerate(self.plan):
            written = self.step(step, values)
            yield written
            values.update(written)
            self.forget(values, index)

    def forget(self, values: dict[str, Tensor], index: int) -> None:
        """Drop from ``values`` what no step after the plan's ``index``-th reads."""
        for name in [name for name in values if self._last_reads.get(name, -1) <= index]:
            del values[name]

    def step(self, step: Step, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what ``step`` of the plan writes, computed from ``values``."""
        if isinstance(step, Head):
            return self._head(step, values[step.input])
        if isinstance(step, Pool):
            x = values[step.input]
            y = cpu.pool(x, step.mode)
            if step.mode == "max":
                return {step.output: y}
        elif isinstance(step, SqueezeExcite):
            y = cpu.squeeze_excite(values[step.input], values[step.residual], step)
        else:
            y = self.affine(step, values)
            if isinstance(step, Stem) or (isinstance(step, Conv) and step.relu):
                y = y.relu_()
            if isinstance(step, Stem) and step.pool:
                y = cpu.pool(y, "max")  # rounding does not change which number is the largest
        return {step.output: self.rounded_(y, step.output)}

    def affine(self, step: Step, values: dict[str, Tensor]) -> Tensor:
        """Return the sum that the stem or a convolution computes, before ReLU, pooling and rounding."""
        assert isinstance(step, (Stem, Conv))
        x, weight = values[step.input], self._weights[step.name]
        if isinstance(step, Stem):
            x = _padded(x, step, step.name in self._weight_scales)
            return _convolution(x, weight, step.bias, step.stride, 0, 1)
        y = _convolution(x, weight, step.bias, step.stride, step.padding, step.groups)
        return y if step.residual is None else y.add_(values[step.residual])

    def rounded_(self, y: Tensor, name: str) -> Tensor:
        """Round ``y`` in place to the levels of the value ``name``, if it is in 8 bit."""
        scale = self._scales.get(name)
        return y if scale is None else to_levels_(y, scale)

    def _head(self, step: Head, x: Tensor) -> dict[str, Tensor]:
        pooled = x.mean((2, 3))
        inside = self.rounded_(pooled.clone(), POOLED) if step.name in self._weight_scales else pooled
        return {POOLED: pooled, LOGITS: functional.linear(inside, self._weights[step.name], step.bias)}

    def _weight(self, step: Step) -> Tensor:
        """Return the weight as float32 that stands for it, in PyTorch's layout."""
        weight = step.weight.to(torch.float32)
        scale = self._weight_scales.get(step.name)
        if scale is not None:
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        return weight if weight.dim() == 2 else weight.permute(0, 3, 1, 2)


def to_levels_(y: Tensor, scale: Scale) -> Tensor:
    """Round ``y`` in place to the nearest number that a level of ``scale`` stands for."""
    return y.div_(scale.scale).round_().clamp_(-scale.zero_point, LARGEST - scale.zero_point).mul_(scale.scale)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    """Convolve with oneDNN. On one thread, ``functional.conv2d`` would use slower code for small batches."""
    return torch.mkldnn_convolution(x, weight, bias, [padding] * 2, [stride] * 2, [1, 1], groups)


def _padded(x: Tensor, step: Stem, in_8_bit: bool) -> Tensor:
    """Return the input of the stem's sum with its border: pixels for 8 bit, normalised otherwise."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device=x.device).view(1, 3, 1, 1) for v in (step.mean, step.std))
    x = x.to(torch.float32, memory_format=torch.channels_last)
    if not in_8_bit:
        return functional.pad((x / 255 - mean) / std, [step.padding] * 4)
    border = (mean * 255).round()
    return functional.pad(x - border, [step.padding] * 4) + border
