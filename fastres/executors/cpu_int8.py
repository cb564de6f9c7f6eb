"""The CPU executor of plans in 8 bit: runs oneDNN's integer convolutions.

Every value between the stem and the pool is a channels-last uint8 tensor. A convolution, its bias, the residual, ReLU
and the rounding to the levels of its output are one oneDNN primitive. The residual is overwritten with the result. The
stem reads pixels. Normalised input is first rounded to the pixels that it comes from.

The first stages of a large batch run a few images at a time, so that their activations stay in the processor's caches.
The later stages have large weights and small activations, and run whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastres.errors import Int8Warning
from fastres.network.plan import LOGITS, POOLED, Conv, Head, Plan, Pool, Shape, SqueezeExcite, Stem, Step, last_reads
from fastres.network.quantisation import LARGEST, WEIGHT_LIMIT_WITHOUT_VNNI, Quantisation, Scale
from fastres.onednn.primitives import Levels
from fastres.terminal import warn

from . import cpu
from .cpu import CpuExecutor
from .int8_steps import (
    Int8Conv,
    Int8Product,
    is_product,
    limited,
    pack_convolution,
    pack_product,
    saturates,
    speedup,
)  # fmt: skip
from .packing import SHAPES_KEPT
from .pixels import Pixels
from .processor import cpu_name, has_amx, instruction_sets
from .recent import Recent

# The first stages run so many images at a time that their largest activation takes about this much memory. With AMX,
# the products take so little time that the fixed time of a call counts for more than the caches.
PART_BYTES, PART_BYTES_WITH_AMX = 4 * 2**20, 12 * 2**20
# They end where a block's weights take more than this share of the memory of its activations, for these images.
WEIGHTS_SHARE = 0.25


class Int8Executor(CpuExecutor):
    """Runs a plan in 8 bit whose weights are on the CPU."""

    pixels: Pixels

    def __init__(self, plan: Plan) -> None:
        plan = _fitted(plan)
        assert plan.quantisation is not None
        self._scales, self._weight_scales = plan.quantisation.values, plan.quantisation.weights
        self._parts: Recent[Shape, tuple[int, int]] = Recent(SHAPES_KEPT)
        self.pixels = Pixels(plan.stem)
        super().__init__(plan)
        self._weights_guard += 0 * sum(float(scale.sum()) for scale in self._weight_scales.values())

    def prepare(self, x: Tensor, memory_format: torch.memory_format) -> Tensor:
        """Return ``x``: the stem prepares it, a few images at a time."""
        return x

    def _run_steps(self, values: dict[str, Tensor], indices: range, shape: Shape, outputs: Sequence[str]) -> None:
        end, images = self._parts_of(shape)
        if images >= shape[0] or not {LOGITS, POOLED}.issuperset(outputs):
            super()._run_steps(values, indices, shape, outputs)
            return
        first = self._plan.steps[end - 1].output
        parts = []
        for part in values[self._plan.stem.input].split(images):
            local = {self._plan.stem.input: part}
            super()._run_steps(local, range(end), (part.shape[0], *shape[1:]), outputs)
            parts.append(local[first])
        values[first] = torch.cat(parts)
        super()._run_steps(values, range(end, len(indices)), shape, outputs)

    def _parts_of(self, shape: Shape) -> tuple[int, int]:
        with self._guard:
            return self._parts.get_or_make(shape, lambda: first_stages(self._plan, shape))

    def run_step(
        self,
        step: Step,
        values: dict[str, Tensor],
        index: int,
        packed: dict[str, Any],
        outputs: Sequence[str],
    ) -> None:
        """Compute ``step``, the plan's ``index``-th, from ``values`` and add its outputs to them."""
        if isinstance(step, Head):
            self._int8_head(values, step, packed.get(step.name), LOGITS in outputs)
            return
        x = values[step.input]
        if isinstance(step, Stem):
            values[step.output] = self._stem(step, x, packed[step.name])
        elif isinstance(step, Pool):
            values[step.output] = _pool(x, step.mode)
        elif isinstance(step, Conv) and step.name in self._weight_scales:
            conv = packed[step.name]
            if step.residual is None:
                values[step.output] = conv(x)
                return
            values[step.output] = conv.add_(self._residual(step.residual, values, index, outputs), x)
        else:
            self._float_step(step, values, packed)

    def _stem(self, step: Stem, x: Tensor, conv: Any) -> Tensor:
        if step.name in self._weight_scales:
            y = conv(self.pixels.of(x))
        else:
            y = self._levels(conv(super().prepare(x, torch.channels_last)), step.output)
        return _pool(y, "max") if step.pool else y

    def _float_step(self, step: Step, values: dict[str, Tensor], packed: dict[str, Any]) -> None:
        """Compute a step that stays in float32, from the numbers that the levels of its inputs stand for."""
        x = self.real(values[step.input], step.input)
        if isinstance(step, SqueezeExcite):
            y = cpu.squeeze_excite(x, self.real(values[step.residual], step.residual), step)
        else:
            assert isinstance(step, Conv)
            residual = None if step.residual is None else self.real(values[step.residual], step.residual)
            conv = packed[step.name]
            y = conv(x) if residual is None else conv.add_(residual.clone(memory_format=torch.channels_last), x)
        values[step.output] = self._levels(y, step.output)

    def _int8_head(self, values: dict[str, Tensor], head: Head, product: Int8Product | None, classify: bool) -> None:
        x = values[head.input]
        scale = self._scales.get(head.input)
        if scale is None:
            pooled = x.mean((2, 3))
        else:
            pooled = x.sum((2, 3), dtype=torch.int32).to(torch.float32).mul_(scale.scale / (x.shape[2] * x.shape[3]))
        values[POOLED] = pooled
        if classify:
            read = self._classified(pooled)
            values[LOGITS] = functional.linear(read, *self._classifier) if product is None else product.of_rows(read)

    def _classified(self, averages: Tensor) -> Tensor:
        """Return the averages ``[N, C]`` as the classifier reads them: in levels, if it is in 8 bit."""
        if self._plan.head.name not in self._weight_scales:
            return averages
        return averages.div(self._scales[POOLED].scale).round_().clamp_(0, LARGEST).to(torch.uint8)

    def scale_of(self, name: str) -> float:
        """Return what one level of the value ``name`` stands for; 1 if it is not in 8 bit."""
        return self._scales[name].scale if name in self._scales else 1.0

    def _returned(self, value: Tensor, name: str) -> Tensor:
        return self.real(value, name)

    def real(self, value: Tensor, name: str) -> Tensor:
        """Return what the levels of the value called ``name`` stand for, in float32."""
        if value.dtype != torch.uint8:
            return value
        scale = self._scales[name]
        value = value.to(torch.float32)
        return (value.sub_(scale.zero_point) if scale.zero_point else value).mul_(scale.scale)

    def _levels(self, y: Tensor, name: str) -> Tensor:
        """Round ``y`` to the levels of the value called ``name``; return it as it is if that is in float32."""
        scale = self._scales.get(name)
        if scale is None:
            return y
        levels = y.div(scale.scale).round_()
        levels = levels.add_(scale.zero_point) if scale.zero_point else levels
        return levels.clamp_(0, LARGEST).to(torch.uint8, memory_format=torch.channels_last)

    def pack_one(self, step: Step, shape: Shape) -> Any:
        """Return ``step`` packed for an input of ``shape`` (NHWC); ``None`` if it has no weights to pack."""
        return self._pack_int8(step, shape) if step.name in self._weight_scales else super().pack_one(step, shape)

    def value_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the plan's value ``name``."""
        return torch.uint8 if name in self._scales else torch.float32

    def is_direct(self, step: Step) -> bool:
        """Return True if :attr:`direct` computes ``step`` on oneDNN's primitives: if it is in 8 bit."""
        if isinstance(step, Pool):
            return step.mode == "max" and self.value_dtype(step.output) == torch.uint8
        return isinstance(step, Head) or step.name in self._weight_scales

    def levels_of(self, step: Stem | Conv | Head) -> Levels | None:
        """Return the scales of a step in 8 bit; ``None`` if it is not."""
        if isinstance(step, Head):
            weights = self._weight_scales.get(step.name)
            return None if weights is None else Levels(self._scales[POOLED].scale, weights)
        x, y = self._scales[step.input], self._scales[(self._plan.stem if isinstance(step, Stem) else step).output]
        residual = step.residual if isinstance(step, Conv) else None
        added = Scale(1.0) if residual is None else self._scales[residual]
        return Levels(x.scale, self._weight_scales[step.name], y.scale, y.zero_point, added.scale, added.zero_point)

    def _pack_int8(self, step: Step, shape: Shape) -> Int8Conv | Int8Product:
        scale = self._weight_scales[step.name]
        if isinstance(step, Head):
            return pack_product(step.weight, scale, step.bias, self._scales[POOLED], None, None, "none", shape[0])
        x, y = self._scales[step.input], self._scales[step.output]
        assert isinstance(step, (Stem, Conv))
        relu = isinstance(step, Stem) or step.relu
        residual = step.residual if isinstance(step, Conv) else None
        added = None if residual is None else self._scales[residual]
        activation = "relu" if relu else "none"
        if isinstance(step, Conv) and is_product(step, step.macs(shape)):
            rows = math.prod(shape[:3])
            return pack_product(step.weight[:, 0, 0], scale, step.bias, x, y, added, activation, rows)
        return pack_convolution(step, scale, x, y, added, activation, shape)


def describe(quantisation: Quantisation, step: Step, macs: float, *, direct: bool) -> str:
    """Name the operations that run ``step`` of so many ``macs``, for :meth:`fastres.Model.explain`.

    ``direct`` means that oneDNN's primitives are called directly, and not through torch's operators.
    """
    if isinstance(step, Pool):
        return f"uint8 {'max_pool2d' if step.mode == 'max' else 'avg_pool2d in float32'}"
    if step.name not in quantisation.weights:
        return f"{cpu.describe(step)} in float32"
    if isinstance(step, Head):
        return "mean, oneDNN u8·s8 product"
    assert isinstance(step, (Stem, Conv))
    kind = "product" if not direct and isinstance(step, Conv) and is_product(step, macs) else "conv"
    if isinstance(step, Stem):
        return "pixels, oneDNN u8·s8 conv+bias+relu" + (", uint8 max_pool2d" if step.pool else "")
    parts = [f"{kind}+bias"] + ["+add"] * (step.residual is not None) + ["+relu"] * step.relu
    return "oneDNN u8·s8 " + "".join(parts)


def _fitted(plan: Plan) -> Plan:
    """Return the plan as this processor can compute it. Warn if that is less exact, or no faster than float32."""
    times = speedup(torch.get_num_threads())
    if times <= 1:
        warn(
            f"A convolution in 8 bit takes {1 / times:.1f} times as long as in float32 on this processor "
            f"({cpu_name()}; {', '.join(instruction_sets())}): the float model is faster here",
            Int8Warning,
        )
    if not saturates():
        return plan
    fitted = limited(plan, WEIGHT_LIMIT_WITHOUT_VNNI)
    if fitted is not plan:
        warn(
            f"This processor ({cpu_name()}) has no VNNI instructions, or an environment variable turns them off. "
            "8-bit products would overflow, so the weights are rounded to 7 bits here, and logits differ from those on "
            f"other processors. Quantize with weight_limit={WEIGHT_LIMIT_WITHOUT_VNNI} to get the same everywhere",
            Int8Warning,
        )
    return fitted


def _pool(x: Tensor, mode: str) -> Tensor:
    """Pool uint8 or float32 ``x``. The levels of the output have the scale of the input's."""
    if x.dtype != torch.uint8:
        return cpu.pool(x, mode)
    if mode == "max":  # functional.max_pool2d refuses channels-last integers
        return torch.ops.quantized.max_pool2d(x, [3, 3], [2, 2], [1, 1], [1, 1], False)
    return cpu.pool(x.to(torch.float32), mode).round_().to(torch.uint8)


def first_stages(plan: Plan, shape: Shape) -> tuple[int, int]:
    """Return up to which step the plan runs in parts, and the number of images in a part. Needs no weight data.

    The parts have equal sizes, and cover whole blocks: after the last of these steps, its output alone is needed.
    """
    n, h, w, _ = shape
    shapes = plan.shapes(1, h, w)
    outputs = {step.output: math.prod(shapes[step.output]) for step in plan}
    outputs[plan.stem.output] = math.prod(plan.stem.conv_shape((1, h, w, 3)))
    images = max(1, (PART_BYTES_WITH_AMX if has_amx() else PART_BYTES) // max(outputs.values()))
    images = math.ceil(n / math.ceil(n / images))
    last, end, begin = last_reads(plan.steps), 0, 0
    for index, step in enumerate(plan.steps[:-1]):
        needed = {value for value, read in last.items() if read > index} & set(list(outputs)[: index + 1])
        if needed != {step.output}:
            continue
        block = plan.steps[begin : index + 1]
        weights = sum(weight.numel() for part in block for weight, _ in part.parameters)
        if weights > WEIGHTS_SHARE * images * sum(outputs[part.output] for part in block):
            break
        end = begin = index + 1
    return (end, images) if end else (0, n)
