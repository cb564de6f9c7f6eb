"""The reference executor of plans in 8 bit: runs :mod:`fastres.kernels.reference` step by step, in float64.

It is slow and exact. The CPU's and the GPU's executors and exported files are judged by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.kernels import reference
from fastres.network.plan import INPUT, LOGITS, POOLED, Conv, Head, Plan, Pool, SqueezeExcite, Stem, Step
from fastres.network.quantisation import LARGEST, Scale


class ReferenceExecutor:
    """Runs a plan in 8 bit on the CPU. ``values`` can return the integers of every value.

    With ``shaken``, each level that a step writes is moved one up or down, as the generator says. The results then show
    how far errors of one level carry.
    """

    def __init__(self, plan: Plan, shaken: torch.Generator | None = None) -> None:
        assert plan.quantisation is not None
        self._plan, self._shaken = plan, shaken
        self._scales, self._weights = plan.quantisation.values, plan.quantisation.weights

    def run(self, x: Tensor, outputs: Sequence[str] = (LOGITS,)) -> list[Tensor]:
        """Run ``x`` as :meth:`fastres.executors.cpu.CpuExecutor.run` does. Returns float32 tensors."""
        values = self.values(x, outputs)
        found = []
        for name in outputs:
            value = self._real(values, name).to(torch.float32)
            found.append(value if value.dim() == 2 else value.permute(0, 3, 1, 2))
        return found

    def values(self, x: Tensor, outputs: Sequence[str] = (LOGITS,)) -> dict[str, Tensor]:
        """Return every value up to ``outputs``, NHWC: uint8 levels, or float64 if it is not in 8 bit.

        ``"pooled"`` is float64, before it is rounded for a classifier in 8 bit.
        """
        values = {INPUT: x}
        for step in self._plan.steps_for(outputs):
            values.update({name: self._moved(value) for name, value in self._step(step, values).items()})
        return values

    def _moved(self, value: Tensor) -> Tensor:
        if self._shaken is None or value.dtype != torch.uint8:
            return value
        signs = torch.randint(0, 2, value.shape, generator=self._shaken, dtype=torch.int32, device=value.device) * 2 - 1
        return (value + signs).clamp(0, LARGEST).to(torch.uint8)

    def _step(self, step: Step, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(step, Head):
            return self._head(step, values)
        if isinstance(step, Stem):
            return {step.output: self._stem(step, values[INPUT])}
        x = values[step.input]
        if isinstance(step, Pool):
            y = reference.window_pool(x.double(), step.mode)
            return {step.output: y.round().to(x.dtype) if x.dtype == torch.uint8 else y}
        if isinstance(step, Conv) and step.name in self._weights:
            return {step.output: self._conv(step, values)}
        x = self._real(values, step.input)
        if isinstance(step, SqueezeExcite):
            parameters = [tensor.double() for pair in step.parameters for tensor in pair]
            y = reference.squeeze_excite(x, self._real(values, step.residual), *parameters)
        else:
            assert isinstance(step, Conv)
            residual = None if step.residual is None else self._real(values, step.residual)
            shape = {"stride": step.stride, "padding": step.padding, "groups": step.groups, "relu": step.relu}
            y = reference.conv2d(x, step.weight.double(), step.bias, residual, **shape)  # type: ignore[arg-type]
        return {step.output: self._rounded(y, step.output)}

    def _conv(self, step: Conv, values: dict[str, Tensor]) -> Tensor:
        scale, output = self._scales[step.input], self._scales[step.output]
        residual: tuple[Tensor, float, int] | tuple[()] = ()
        if step.residual is not None:
            added = self._scales[step.residual]
            residual = (values[step.residual], added.scale, added.zero_point)
        return reference.quantised_conv2d(
            values[step.input], scale.scale, step.weight, self._weights[step.name], step.bias, *residual,
            stride=step.stride, padding=step.padding, groups=step.groups, relu=step.relu,
            output_scale=output.scale, output_zero_point=output.zero_point,
        )  # fmt: skip

    def _stem(self, step: Stem, x: Tensor) -> Tensor:
        if step.name in self._weights:
            return reference.quantised_stem(
                x, step.weight, self._weights[step.name], step.bias, step.mean, step.std, stride=step.stride,
                padding=step.padding, pool=step.pool, output_scale=self._scales[step.output].scale,
            )  # fmt: skip
        x = x if x.dtype == torch.uint8 else x.double()
        shape = {"stride": step.stride, "padding": step.padding, "pool": step.pool}
        y = reference.stem(x, step.weight.double(), step.bias, step.mean, step.std, **shape)  # type: ignore[arg-type]
        return self._rounded(y, step.output)

    def _head(self, step: Head, values: dict[str, Tensor]) -> dict[str, Tensor]:
        pooled = reference.average_pool(self._real(values, step.input))
        if step.name not in self._weights:
            return {POOLED: pooled, LOGITS: reference.linear(pooled, step.weight.double(), step.bias)}
        scale = self._scales[POOLED].scale
        levels = reference.quantised(pooled, scale)[:, None, None]
        weight, weight_scale = step.weight[:, None, None], self._weights[step.name]
        logits = reference.quantised_conv2d(levels, scale, weight, weight_scale, step.bias)
        return {POOLED: pooled, LOGITS: logits[:, 0, 0]}

    def _real(self, values: dict[str, Tensor], name: str) -> Tensor:
        """Return what the levels of a value stand for, in float64."""
        value = values[name]
        if value.dtype != torch.uint8:
            return value
        scale = self._scales[name]
        return scale.scale * (value.double() - scale.zero_point)

    def _rounded(self, y: Tensor, name: str) -> Tensor:
        scale: Scale | None = self._scales.get(name)
        return y if scale is None else reference.quantised(y, scale.scale, scale.zero_point)
