"""The CPU executor of plans in 8 bit: runs oneDNN's integer convolutions.

Every value between the stem and the pool is a channels-last uint8 tensor. A convolution, its bias, the residual, ReLU
and the rounding to the levels of its output are one oneDNN primitive. The residual is overwritten with the result. The
stem reads pixels. Normalised input is first rounded to the pixels that it comes from.

1×1 convolutions of stride 1 are products of matrices. oneDNN's matrix product takes less time to call than its
convolution, and it alone adds the residual without a copy. So it computes these convolutions if they are small or have
a residual.

The first stages of a large batch run a few images at a time, so that their activations stay in the processor's caches.
The later stages have large weights and small activations, and run whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastres.network.plan import (
    LOGITS,
    POOLED,
    Conv,
    Head,
    Plan,
    Pool,
    Shape,
    SqueezeExcite,
    Stem,
    Step,
    last_reads,
)
from fastres.network.quantisation import LARGEST, WEIGHT_LIMIT, WEIGHT_LIMIT_WITHOUT_VNNI, Quantisation, Scale

from .cpu import CpuExecutor, pack_step
from .packing import SHAPES_KEPT
from .recent import Recent

# The first stages run so many images at a time that their largest activation takes about this much memory.
PART_BYTES = 4 * 2**20
# They end where a block's weights take more than this share of the memory of its activations, for these images.
WEIGHTS_SHARE = 0.25
# Below so many multiply-accumulates, the matrix product saves more time in the call than its kernel may lose.
SMALL_MACS = 100e6

_NO_SCALARS: list[float] = []
_NO_DILATION = [1, 1]


@dataclass(frozen=True, eq=False)
class Int8Conv:
    """A convolution in 8 bit with its weight in oneDNN's layout. ``before`` and ``after`` are oneDNN's arguments."""

    weight: Tensor
    before: tuple[Any, ...]  # between the input and the bias
    bias: Tensor
    geometry: tuple[Any, ...]
    output: tuple[Any, ...]
    added: tuple[Any, ...]
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.onednn.qconv2d_pointwise.default(
            x, *self.before, self.bias, *self.geometry, *self.output, self.activation, _NO_SCALARS, ""
        )

    def add_(self, residual: Tensor, x: Tensor) -> Tensor:
        """Overwrite ``residual`` with the result, including the residual, and return it."""
        torch.ops.onednn.qconv2d_pointwise.binary(
            x, *self.before, residual, self.bias, *self.geometry, *self.output, *self.added, "sum", 1.0,
            self.activation, _NO_SCALARS, "",
        )  # fmt: skip
        return residual


@dataclass(frozen=True, eq=False)
class Int8Product:
    """A 1×1 convolution of stride 1 in 8 bit, as a product of matrices."""

    weight: Tensor
    before: tuple[Any, ...]
    bias: Tensor
    output: tuple[Any, ...]
    added: tuple[Any, ...]
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = self.of_rows(x.permute(0, 2, 3, 1).reshape(-1, c))
        return y.view(n, h, w, -1).permute(0, 3, 1, 2)

    def of_rows(self, x: Tensor) -> Tensor:
        """Multiply the rows of ``x`` ``[M, C]``; return ``[M, K]``."""
        return torch.ops.onednn.qlinear_pointwise.default(
            x, *self.before, self.bias, *self.output, self.activation, _NO_SCALARS, ""
        )

    def add_(self, residual: Tensor, x: Tensor) -> Tensor:
        """Overwrite ``residual`` with the result, including the residual, and return it."""
        rows, into = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]), residual.permute(0, 2, 3, 1)
        torch.ops.onednn.qlinear_pointwise.binary(
            rows, *self.before, into.view(-1, into.shape[3]), self.bias, *self.output, *self.added, "sum", 1.0,
            self.activation, _NO_SCALARS, "",
        )  # fmt: skip
        return residual


class Int8Executor(CpuExecutor):
    """Runs a plan in 8 bit whose weights are on the CPU."""

    def __init__(self, plan: Plan) -> None:
        plan = limited(plan, WEIGHT_LIMIT_WITHOUT_VNNI) if saturates() else plan
        assert plan.quantisation is not None
        self._scales, self._weight_scales = plan.quantisation.values, plan.quantisation.weights
        self._parts: Recent[Shape, tuple[int, int]] = Recent(SHAPES_KEPT)
        super().__init__(plan)
        self._weights_guard += 0 * sum(float(scale.sum()) for scale in self._weight_scales.values())
        border = [round(255 * mean) for mean in plan.stem.mean]
        self._border = torch.tensor(border, dtype=torch.uint8, device="cpu")
        scale = [255 * std for std in plan.stem.std]
        self._pixel_scale = torch.tensor(scale, dtype=torch.float32, device="cpu").view(1, 3, 1, 1)
        shift = [255 * mean for mean in plan.stem.mean]
        self._pixel_shift = torch.tensor(shift, dtype=torch.float32, device="cpu").view(1, 3, 1, 1)

    def _prepare(self, x: Tensor) -> Tensor:
        return x  # the stem prepares it, a few images at a time

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
            residual = values[step.residual]
            if step.residual in outputs or self._last_reads[step.residual] > index:
                residual = residual.clone(memory_format=torch.channels_last)
            values[step.output] = conv.add_(residual, x)
        else:
            self._float_step(step, values, packed)

    def _stem(self, step: Stem, x: Tensor, conv: Any) -> Tensor:
        if step.name in self._weight_scales:
            y = conv(self._pixels(x, step.padding))
        else:
            y = self._levels(conv(super()._prepare(x)), step.output)
        return _pool(y, "max") if step.pool else y

    def _pixels(self, x: Tensor, padding: int) -> Tensor:
        """Return the pixels of ``x``, channels-last, with a border in the mean colour, which stands for zeros."""
        n, _, h, w = x.shape
        if x.dtype != torch.uint8:
            x = torch.addcmul(self._pixel_shift, x, self._pixel_scale).round_().clamp_(0, LARGEST)
        padded = self._border.repeat(n, h + 2 * padding, w + 2 * padding, 1)
        padded[:, padding : padding + h, padding : padding + w].copy_(x.permute(0, 2, 3, 1))
        return padded.permute(0, 3, 1, 2)

    def _float_step(self, step: Step, values: dict[str, Tensor], packed: dict[str, Any]) -> None:
        """Compute a step that stays in float32, from the numbers that the levels of its inputs stand for."""
        x = self.real(values[step.input], step.input)
        if isinstance(step, SqueezeExcite):
            y = _squeeze_excite(x, self.real(values[step.residual], step.residual), step)
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
            pooled = x.sum((2, 3), dtype=torch.int32) * (scale.scale / (x.shape[2] * x.shape[3]))
        values[POOLED] = pooled
        if not classify:
            return
        if product is None:
            values[LOGITS] = functional.linear(pooled, *self._classifier)
        else:
            levels = pooled.div(self._scales[POOLED].scale).round_().clamp_(0, LARGEST).to(torch.uint8)
            values[LOGITS] = product.of_rows(levels)

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

    def _pack(self, shape: Shape) -> dict[str, Any]:
        shapes = self._plan.shapes(*shape[:3])
        packed: dict[str, Any] = {}
        for step in self._plan:
            if step.name in self._weight_scales:
                packed[step.name] = self._pack_int8(step, shapes[step.input])
            elif isinstance(step, (Stem, Conv)):
                packed[step.name] = pack_step(step, shapes[step.input])
        return packed

    def _pack_int8(self, step: Step, shape: Shape) -> Int8Conv | Int8Product:
        scale = self._weight_scales[step.name]
        if isinstance(step, Head):
            return _product(step.weight, scale, step.bias, self._scales[POOLED], None, None, "none", shape[0])
        x, y = self._scales[step.input], self._scales[step.output]
        assert isinstance(step, (Stem, Conv))
        relu = isinstance(step, Stem) or step.relu
        residual = step.residual if isinstance(step, Conv) else None
        added = None if residual is None else self._scales[residual]
        activation = "relu" if relu else "none"
        if isinstance(step, Conv) and _is_product(step, step.macs(shape)):
            rows = math.prod(shape[:3])
            return _product(step.weight[:, 0, 0], scale, step.bias, x, y, added, activation, rows)
        return _convolution(step, scale, x, y, added, activation, shape)


def _is_product(step: Conv, macs: float) -> bool:
    plain = step.weight.shape[1:3] == (1, 1) and step.stride == 1 and step.groups == 1 and step.padding == 0
    return plain and (step.residual is not None or macs < SMALL_MACS)


def _convolution(
    step: Stem | Conv, scale: Tensor, x: Scale, y: Scale, added: Scale | None, activation: str, shape: Shape
) -> Int8Conv:
    n, h, w, c = shape
    groups, padding = (step.groups, step.padding) if isinstance(step, Conv) else (1, 0)
    if isinstance(step, Stem):  # its input is padded already
        h, w = h + 2 * step.padding, w + 2 * step.padding
    strides, pads = [step.stride] * 2, [padding] * 2
    weight = torch.ops.onednn.qconv_prepack(
        step.weight.permute(0, 3, 1, 2).contiguous(), scale, x.scale, 0, strides, pads, _NO_DILATION, groups,
        [n, c, h, w],
    )  # fmt: skip
    before = (x.scale, 0, weight, scale, _zeros(len(scale)))
    geometry = (strides, pads, _NO_DILATION, groups)
    return Int8Conv(weight, before, step.bias, geometry, _output(y), _added(added), activation)


def _product(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    x: Scale,
    y: Scale | None,
    added: Scale | None,
    activation: str,
    rows: int,
) -> Int8Product:
    packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), [rows, weight.shape[1]])
    before = (x.scale, 0, packed, scale, _zeros(len(scale)))
    return Int8Product(packed, before, bias, _output(y), _added(added), activation)


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device="cpu")


def _output(scale: Scale | None) -> tuple[Any, ...]:
    return (1.0, 0, torch.float32) if scale is None else (scale.scale, scale.zero_point, torch.uint8)


def _added(scale: Scale | None) -> tuple[Any, ...]:
    return () if scale is None else (scale.scale, scale.zero_point)


def _pool(x: Tensor, mode: str) -> Tensor:
    """Pool uint8 or float32 ``x``. The levels of the output have the scale of the input's."""
    if mode == "max":
        if x.dtype == torch.uint8:  # functional.max_pool2d refuses channels-last integers
            return torch.ops.quantized.max_pool2d(x, [3, 3], [2, 2], [1, 1], [1, 1], False)
        return functional.max_pool2d(x, 3, 2, 1)
    y = functional.avg_pool2d(x.to(torch.float32), 2, 2, ceil_mode=True, count_include_pad=False)
    return y.round_().to(torch.uint8) if x.dtype == torch.uint8 else y


def _squeeze_excite(x: Tensor, residual: Tensor, step: SqueezeExcite) -> Tensor:
    squeezed = functional.linear(x.mean((2, 3)), step.weight, step.bias).relu_()
    gate = functional.linear(squeezed, step.expand_weight, step.expand_bias).sigmoid_()
    return torch.addcmul(residual, x, gate[:, :, None, None]).relu_()


def first_stages(plan: Plan, shape: Shape) -> tuple[int, int]:
    """Return up to which step the plan runs in parts, and the number of images in a part. Needs no weight data.

    The parts have equal sizes, and cover whole blocks: after the last of these steps, its output alone is needed.
    """
    n, h, w, _ = shape
    shapes = plan.shapes(1, h, w)
    outputs = {step.output: math.prod(shapes[step.output]) for step in plan}
    outputs[plan.stem.output] = math.prod(plan.stem.conv_shape((1, h, w, 3)))
    images = max(1, PART_BYTES // max(outputs.values()))
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


def limited(plan: Plan, limit: int) -> Plan:
    """Return ``plan`` with weights of at most ``limit``, rounded again where they are larger."""
    assert plan.quantisation is not None
    steps, scales = list(plan.steps), dict(plan.quantisation.weights)
    for index, step in enumerate(steps):
        if step.name not in scales or int(step.weight.abs().amax()) <= limit:
            continue
        ratio = limit / WEIGHT_LIMIT
        weight = (step.weight.double() * ratio).round().to(torch.int8)
        before = step.weight.double() * scales[step.name].double().view(-1, *[1] * (step.weight.dim() - 1))
        scales[step.name] = (scales[step.name].double() / ratio).to(torch.float32)
        bias = step.bias
        if isinstance(step, Stem):  # a picture in the mean colour still gives the same result
            after = weight.double() * scales[step.name].double().view(-1, 1, 1, 1)
            mean = torch.tensor(step.mean, dtype=torch.float64, device="cpu")
            bias = (bias.double() + ((before - after) * 255 * mean).sum((1, 2, 3))).to(torch.float32)
        steps[index] = replace(step, weight=weight, bias=bias)
    return replace(plan, steps=tuple(steps), quantisation=Quantisation(plan.quantisation.values, scales))


@lru_cache
def saturates() -> bool:
    """Return True if the processor adds pairs of products in 16 bits, so that weights above 64 give wrong results.

    This is so without VNNI instructions. It is tried out, because environment variables can turn them off.
    """
    weight = torch.full((16, 16, 1, 1), 127, dtype=torch.int8, device="cpu")
    x = torch.full((1, 16, 4, 4), LARGEST, dtype=torch.uint8, device="cpu").contiguous(
        memory_format=torch.channels_last
    )
    scale = torch.ones(16, dtype=torch.float32, device="cpu")
    conv = Conv("probe", "x", "y", weight.permute(0, 2, 3, 1), torch.zeros(16, dtype=torch.float32, device="cpu"))
    found = _convolution(conv, scale, Scale(1.0), Scale(1.0), None, "none", (1, 4, 4, 16))
    y = replace(found, output=_output(None))(x)
    return not bool((y == 16 * 127 * LARGEST).all())
