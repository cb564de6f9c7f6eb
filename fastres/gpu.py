"""The GPU executor: a Plan on Triton kernels.

Weights are packed once, when the executor is built. A call takes one buffer from torch's allocator for all its
activations (laid out by :mod:`fastres.arena`) and launches one kernel a step, on the input's device and current stream,
so that several threads and streams can call one model. With TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .arena import Arena, plan_arena
from .errors import InputError
from .folding import outline
from .kernels import dispatch, grouping, head, launch, routing, stem
from .plan import INPUT, LOGITS, POOLED, Conv, Head, Plan, Shape, Stem, Step

# (image shape, outputs) pairs whose schedule is kept. A schedule is a few kilobytes of plain data.
SCHEDULES_KEPT = 64


@dataclass(frozen=True)
class Schedule:
    """What a call with one input shape does: steps, every value's shape, and where it lives."""

    steps: tuple[Step, ...]
    shapes: dict[str, Shape]
    strides: dict[str, tuple[int, ...]]
    arena: Arena


class GpuExecutor:
    """Runs a plan whose weights are on a CUDA device (or, interpreted, on the CPU) in float32, bfloat16 or float16."""

    def __init__(self, plan: Plan) -> None:
        self.dtype = plan.stem.weight.dtype
        self.device = plan.stem.weight.device
        self._plan = pack(plan)
        packed = self._plan.stem
        self._normalisation = stem.pack_normalisation(packed.mean, packed.std, packed.weight.shape[2], self.device)
        self._schedules: OrderedDict[tuple[Shape, tuple[str, ...]], Schedule] = OrderedDict()
        self._outline = outline(plan.architecture, self.dtype)
        self._lock = threading.Lock()

    def run(self, x: Tensor, outputs: Sequence[str] = (LOGITS,)) -> list[Tensor]:
        """Run the plan on ``x`` ``[N, 3, H, W]`` (normalised floats or uint8 pixels) up to what ``outputs`` need.

        Returns float32 logits ``[N, classes]``, the pooled features ``[N, C]`` or a plan's value as a channels-last
        ``[N, C, H, W]`` tensor in the executor's dtype, for each name in ``outputs``. Each is memory of its own.
        """
        n, _, h, w = x.shape
        schedule = self._schedule((n, h, w, 3), tuple(outputs))
        arena = torch.empty(schedule.arena.size, dtype=self.dtype, device=self.device)
        values: dict[str, Tensor] = {INPUT: x}
        for step in schedule.steps:
            self.run_step(step, values, schedule, arena, outputs)
        return [_public(values[output]) for output in outputs]

    def run_step(
        self, step: Step, values: dict[str, Tensor], schedule: Schedule, arena: Tensor, outputs: Sequence[str]
    ) -> None:
        """Launch ``step``'s kernels on ``values`` and add what it writes to them."""
        if isinstance(step, Head):
            self._head(values, step, LOGITS in outputs)
            return
        shape = schedule.shapes[step.output]
        offset = schedule.arena.offsets.get(step.output)
        if offset is None:
            y = torch.empty(shape, dtype=self.dtype, device=self.device)
        else:
            y = arena.as_strided(shape, schedule.strides[step.output], offset)
        values[step.output] = y
        if isinstance(step, Stem):
            stem.stem_into(
                y,
                values[step.input],
                step.weight,
                step.bias,
                *self._normalisation,
                stride=step.stride,
                padding=step.padding,
                pool=step.pool,
            )
        else:
            assert isinstance(step, Conv)
            dispatch.convolve_into(
                y,
                values[step.input],
                step.weight,
                step.bias,
                None if step.residual is None else values[step.residual],
                stride=step.stride,
                padding=step.padding,
                groups=step.groups,
                relu=step.relu,
            )

    def _head(self, values: dict[str, Tensor], step: Head, classify: bool) -> None:
        x = values[step.input]
        pooled = torch.empty(x.shape[0], x.shape[3], dtype=self.dtype, device=self.device)
        head.average_pool_into(pooled, x)
        values[POOLED] = pooled
        if classify:
            logits = torch.empty(x.shape[0], step.weight.shape[0], dtype=torch.float32, device=self.device)
            head.linear_into(logits, pooled, step.weight, step.bias)
            values[LOGITS] = logits

    def _schedule(self, shape: Shape, outputs: tuple[str, ...]) -> Schedule:
        key = (shape, outputs)
        with self._lock:
            schedule = self._schedules.get(key)
            if schedule is None:
                schedule = self._schedules[key] = self._make_schedule(shape, outputs)
                if len(self._schedules) > SCHEDULES_KEPT:
                    self._schedules.popitem(last=False)
            else:
                self._schedules.move_to_end(key)
            return schedule

    def _make_schedule(self, shape: Shape, outputs: tuple[str, ...]) -> Schedule:
        n, h, w, _ = shape
        if h * w * stem.CHANNELS >= launch.INT32_ELEMENTS:
            raise InputError(f"An image of {h}×{w} has 2³¹ elements or more; resize it")
        shapes = self._outline.shapes(n, h, w)
        steps = self._plan.steps_for(outputs)
        strides = {value: _strides(value_shape) for value, value_shape in shapes.items()}
        return Schedule(steps, shapes, strides, plan_arena(steps, shapes, outputs))


def pack(plan: Plan) -> Plan:
    """The plan with its weights in the kernels' layouts: the stem's padded, small groups merged into dense ones."""
    steps: list[Step] = []
    for step in plan:
        if isinstance(step, Stem):
            step = replace(step, weight=stem.pack_stem_weight(step.weight))
        elif isinstance(step, Conv) and step.groups > 1:
            weight, groups = grouping.merge_groups(step.weight, step.groups)
            step = replace(step, weight=weight, groups=groups)
        steps.append(step)
    return replace(plan, steps=tuple(steps))


def conv_shape(step: Conv, shape: Shape) -> routing.ConvShape:
    """The convolution that the kernel runs for ``step`` on an input of ``shape`` (NHWC), small groups merged."""
    n, h, w, _ = shape
    k, r, s, c = step.weight.shape
    merge = grouping.merged_groups(c, step.groups) if step.groups > 1 else 1
    groups = step.groups // merge
    return routing.ConvShape(n, h, w, c * merge, k // groups, r, s, step.stride, step.padding, groups)


def describe(step: Step, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[str, str, str]:
    """Kernel, configuration and note of ``step`` on an input of ``shape``, for :meth:`fastres.Model.explain`."""
    gpu = routing.gpu_of(device)
    if isinstance(step, Stem):
        columns = step.conv_shape(shape)[2]
        config = routing.route_stem(step.weight.shape[0], columns, dtype, gpu, step.pool)
        return config.kernel, str(config), ""
    if isinstance(step, Head):
        n, h, w, c = shape
        pool = routing.route_pool(c, h * w)
        if not step.weight.shape[0]:
            return pool.kernel, str(pool), ""
        linear = routing.ConvShape(n, 1, 1, c, step.weight.shape[0], 1, 1, 1, 0)
        routed = routing.route_conv(linear, dtype, gpu, launch.float32_precision())
        return f"{pool.kernel}, {routed.kernel}", f"{pool}; {routed}", routed.note
    assert isinstance(step, Conv)
    sizes = conv_shape(step, shape)
    residual = step.residual is not None
    routed = dispatch.route(sizes, dtype, gpu, residual=residual, precision=launch.float32_precision())
    note = f"{step.groups} groups run as {sizes.groups} block-diagonal ones" if sizes.groups != step.groups else ""
    return routed.kernel, str(routed), "; ".join(filter(None, (note, routed.note)))


def _strides(shape: Shape) -> tuple[int, ...]:
    """Contiguous strides of ``shape``, in elements."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)


def _public(value: Tensor) -> Tensor:
    """NHWC values as the NCHW, channels-last tensors that PyTorch users expect."""
    return value.permute(0, 3, 1, 2) if value.dim() == 4 else value
