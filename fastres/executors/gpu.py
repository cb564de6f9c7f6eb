"""The GPU executor: runs a Plan on Triton kernels.

Weights are packed once, when the executor is built. A call takes one buffer from torch's allocator for all its
activations (:mod:`fastres.executors.arena` plans it) and launches one kernel per step, on the input's device and
current stream. Several threads and streams can therefore call one model. If the GPU's tuned table says so, runs of
convolutions are joined into one kernel (:mod:`fastres.folding.fusion`), and the first stages run in micro-batches small
enough for their activations to stay in the L2 cache. With TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastres.errors import InputError
from fastres.folding.build import outline
from fastres.folding.fusion import Candidates, cover, joinable
from fastres.forks import Guard
from fastres.kernels import conv, dispatch, fused, head, launch, pool, squeeze_excite, stem
from fastres.kernels.routing import cards, grouping, rules
from fastres.kernels.routing.tables import Network, TunedBlock
from fastres.kernels.routing.without import left_out
from fastres.network.plan import INPUT, LOGITS, POOLED, Conv, Head, Joined, Plan, Pool, Shape, SqueezeExcite, Stem, Step
from fastres.roofline.gpu_shapes import block_of, conv_shape, linear_shape
from fastres.text import dtype_name

from .arena import Arena, plan_arena
from .micro_batches import micro_batches
from .recent import Recent

# Number of (image shape, outputs) pairs whose schedule is kept. A schedule is a few kilobytes of plain data.
SCHEDULES_KEPT = 64

ARRIVED = "arrived"  # the counters of split reductions; not a value of any plan


@dataclass(frozen=True)
class Schedule:
    """A call with one input shape: steps, configurations of joined steps, and the shape and place of each value."""

    steps: tuple[Step, ...]
    configs: dict[str, rules.ConvConfig]
    shapes: dict[str, Shape]
    strides: dict[str, tuple[int, ...]]
    arena: Arena
    arrivals: int  # counters for the convolutions whose reduction is split


class GpuExecutor:
    """Runs a plan whose weights are on a CUDA device (or, interpreted, on the CPU) in float32, bfloat16 or float16."""

    def __init__(self, plan: Plan) -> None:
        self.dtype = plan.stem.weight.dtype
        self.device = plan.stem.weight.device
        self._plan = pack(plan)
        packed = self._plan.stem
        self._normalisation = stem.pack_normalisation(packed.mean, packed.std, packed.weight.shape[2], self.device)
        self._candidates = candidates(self._plan, self.device)
        self._schedules: Recent[tuple[Shape, tuple[str, ...], str, bool], Schedule] = Recent(SCHEDULES_KEPT)
        self._outline = outline(plan.architecture, self.dtype)
        self._guard = Guard()

    def run(self, x: Tensor, outputs: Sequence[str] = (LOGITS,)) -> list[Tensor]:
        """Run the plan on ``x`` ``[N, 3, H, W]`` (normalised floats or uint8 pixels), as far as ``outputs`` need.

        Returns one tensor for each name in ``outputs``, in its own memory: float32 logits ``[N, classes]``, the pooled
        features ``[N, C]``, or a value of the plan as a channels-last ``[N, C, H, W]`` tensor, the last two in the
        executor's dtype.
        """
        n, _, h, w = x.shape
        return self.run_as(x, outputs, tuned_network(self._outline, (n, h, w, 3), self.dtype, self.device))

    def run_as(self, x: Tensor, outputs: Sequence[str], how: Network | None) -> list[Tensor]:
        """Run like :meth:`run` but in the given way, which the tuner compares with others.

        ``None`` runs the whole batch at once, with the joined runs that the table lists.
        """
        if how is not None and how.early and "early" not in left_out():
            with launch.early_launches():
                return self.run_as(x, outputs, replace(how, early=False))
        n, _, h, w = x.shape
        joined = how is None or how.joined
        values: dict[str, Tensor] = {INPUT: x}
        done = INPUT
        if how is not None and in_micro_batches(how, n, outputs):
            done = self._outline.features[how.through]
            shape = self._outline.shapes(n, h, w)[done]
            values[done] = torch.empty(shape, dtype=self.dtype, device=self.device)
            for start in range(0, n, how.images):
                part = slice(start, min(start + how.images, n))
                few = {INPUT: x[part], done: values[done][part]}
                self._run(self._schedule((len(few[INPUT]), h, w, 3), (done,), INPUT, joined), few, (done,))
        self._run(self._schedule((n, h, w, 3), tuple(outputs), done, joined), values, outputs)
        return [_public(values[output]) for output in outputs]

    def _run(self, schedule: Schedule, values: dict[str, Tensor], outputs: Sequence[str]) -> None:
        """Run the schedule's steps on ``values``, in a new buffer."""
        arena = torch.empty(schedule.arena.size, dtype=self.dtype, device=self.device)
        if schedule.arrivals:  # all steps share these zeros, and each step resets them
            values[ARRIVED] = torch.zeros(schedule.arrivals, dtype=torch.int32, device=self.device)
        for step in schedule.steps:
            self.run_step(step, values, schedule, arena, outputs)

    def run_step(
        self, step: Step, values: dict[str, Tensor], schedule: Schedule, arena: Tensor, outputs: Sequence[str]
    ) -> None:
        """Launch ``step``'s kernels on ``values`` and add its outputs. Outputs already in ``values`` are reused."""
        if isinstance(step, Head):
            self._head(values, step, LOGITS in outputs)
            return
        for value in step.writes:
            if value not in values:
                values[value] = self._place(schedule, arena, value)
        y, x = values[step.output], values[step.input]
        if isinstance(step, Stem):
            stem.stem_into(
                y,
                x,
                step.weight,
                step.bias,
                *self._normalisation,
                stride=step.stride,
                padding=step.padding,
                pool=step.pool,
            )
        elif isinstance(step, Pool):
            pool.window_pool_into(y, x, mode=step.mode)
        elif isinstance(step, SqueezeExcite):
            (w1, b1), (w2, b2) = step.parameters
            squeeze_excite.squeeze_excite_into(y, x, values[step.residual], w1, b1, w2, b2, arrived=values.get(ARRIVED))
        elif isinstance(step, Joined):
            run_joined(step, values, schedule.configs[step.name])
        else:
            assert isinstance(step, Conv)
            dispatch.convolve_into(
                y,
                x,
                step.weight,
                step.bias,
                None if step.residual is None else values[step.residual],
                stride=step.stride,
                padding=step.padding,
                groups=step.groups,
                relu=step.relu,
                arrived=values.get(ARRIVED),
            )

    def _place(self, schedule: Schedule, arena: Tensor, value: str) -> Tensor:
        """Return memory for a value: its place in the arena, or new memory if the value is returned to the caller."""
        offset = schedule.arena.offsets.get(value)
        if offset is None:
            return torch.empty(schedule.shapes[value], dtype=self.dtype, device=self.device)
        return arena.as_strided(schedule.shapes[value], schedule.strides[value], offset)

    def _head(self, values: dict[str, Tensor], step: Head, classify: bool) -> None:
        x = values[step.input]
        pooled = torch.empty(x.shape[0], x.shape[3], dtype=self.dtype, device=self.device)
        head.average_pool_into(pooled, x)
        values[POOLED] = pooled
        if classify:
            logits = torch.empty(x.shape[0], step.weight.shape[0], dtype=torch.float32, device=self.device)
            head.linear_into(logits, pooled, step.weight, step.bias, arrived=values.get(ARRIVED))
            values[LOGITS] = logits

    def _schedule(self, shape: Shape, outputs: tuple[str, ...], done: str = INPUT, joined: bool = True) -> Schedule:
        key = (shape, outputs, done, joined)
        with self._guard:
            return self._schedules.get_or_make(key, lambda: self._make_schedule(*key))

    def _make_schedule(self, shape: Shape, outputs: tuple[str, ...], done: str, joined: bool) -> Schedule:
        """Return the schedule for ``outputs`` if everything up to the value ``done`` has been computed."""
        n, h, w, _ = shape
        if h * w * stem.CHANNELS >= launch.INT32_ELEMENTS:
            raise InputError(f"An image of {h}×{w} has 2³¹ elements or more; resize it")
        shapes = self._outline.shapes(n, h, w)
        first = 0 if done == INPUT else len(self._plan.steps_for((done,)))
        steps = self._plan.steps_for(outputs)[first:]
        candidates = self._candidates if joined else {}
        runs = {index - first: found for index, found in candidates.items() if index >= first}
        steps, configs = choose_runs(steps, runs, shapes, self.dtype, self.device, outputs)
        strides = {value: _strides(value_shape) for value, value_shape in shapes.items()}
        arrivals = [_arrivals(step, shapes[step.input], self.dtype, self.device) for step in steps]
        return Schedule(steps, configs, shapes, strides, plan_arena(steps, shapes, outputs), max(arrivals, default=0))


def _arrivals(step: Step, shape: Shape, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many counters the launches of ``step`` need for an input of ``shape``."""
    if isinstance(step, SqueezeExcite):
        gpu = cards.gpu_of(device)
        return squeeze_excite.squeeze_arrivals(shape[0], shape[3], step.weight.shape[0], dtype, gpu)
    if isinstance(step, Conv):
        return conv.arrivals(conv_shape(step, shape), _route(step, shape, dtype, device))
    if isinstance(step, Head) and step.weight.shape[0]:
        return conv.arrivals(linear_shape(step, shape), _route(step, shape, dtype, device))
    return 0


def _route(step: Conv | Head, shape: Shape, dtype: torch.dtype, device: torch.device) -> rules.ConvConfig:
    """Return the configuration that runs a convolution, or the head's classifier, on an input of ``shape``."""
    gpu, precision = cards.gpu_of(device), launch.float32_precision()
    if isinstance(step, Head):
        return dispatch.route(linear_shape(step, shape), dtype, gpu, precision=precision, classifier=True)
    residual = step.residual is not None
    return dispatch.route(conv_shape(step, shape), dtype, gpu, residual=residual, precision=precision)


def candidates(plan: Plan, device: torch.device) -> Candidates:
    """Return the runs of a packed plan that may be joined on ``device``. Without tuned joined runs there are none."""
    two_bytes = plan.stem.weight.dtype.itemsize == 2
    return joinable(plan.steps) if two_bytes and dispatch.tuned(cards.gpu_of(device)).has_blocks else {}


def choose_runs(
    steps: Sequence[Step],
    runs: Candidates,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    device: torch.device,
    keep: Sequence[str],
) -> tuple[tuple[Step, ...], dict[str, rules.ConvConfig]]:
    """Return ``steps`` with the runs joined that save time by the device's tuned table, and their configurations."""
    gpu = cards.gpu_of(device)

    def route(run: Joined) -> TunedBlock | None:
        return dispatch.route_block(block_of(run, shapes[run.input], dtype), dtype, gpu)

    def saves(run: Joined) -> float:
        found = route(run)
        return found.saves(shapes[run.input][0]) if found else 0.0

    covered = cover(steps, runs, saves, keep)
    chosen = {step.name: route(step) for step in covered if isinstance(step, Joined)}
    return covered, {name: found.config for name, found in chosen.items() if found}


def as_run(plan: Plan, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Plan, Network | None]:
    """Return ``plan`` as it runs on ``device`` for the logits of a batch of ``shape`` (NHWC). Needs no weight data.

    The runs that ``device`` joins are joined. The second value says how the tuned table runs the network.
    """
    how = tuned_network(plan, shape, dtype, device)
    if how is not None and not how.joined:
        return plan, how
    steps, _ = choose_runs(plan.steps, candidates(plan, device), plan.shapes(*shape[:3]), dtype, device, ())
    return replace(plan, steps=steps), how


def run_joined(step: Joined, values: Mapping[str, Tensor], config: rules.ConvConfig) -> None:
    """Launch the kernel of a joined run on ``values``."""
    y, x, last, following = values[step.output], values[step.input], step.last, step.following
    shortcut = None if step.shortcut is None else values[step.shortcut.input]
    shortcut_stride = 1 if step.shortcut is None else step.shortcut.stride
    if step.first is None:
        assert shortcut is not None
        dispatch.merged_into(
            y,
            x,
            step.weight,
            step.bias,
            shortcut,
            filter_size=(last.weight.shape[1], last.weight.shape[2]),
            stride=last.stride,
            padding=last.padding,
            shortcut_stride=shortcut_stride,
            relu=last.relu,
            config=config,
        )
        return
    fused.fused_into(
        y,
        x,
        step.first.weight,
        step.first.bias,
        step.weight,
        step.bias,
        None if last.residual is None or shortcut is not None else values[last.residual],
        shortcut,
        stride=step.first.stride,
        padding=step.first.padding,
        shortcut_stride=shortcut_stride,
        z=None if following is None else values[following.output],
        weight3=None if following is None else following.weight.flatten(1),
        bias3=None if following is None else following.bias,
        config=config,
    )


def tuned_network(plan: Plan, shape: Shape, dtype: torch.dtype, device: torch.device) -> Network | None:
    """Return the fastest measured way to run a batch of ``shape`` (NHWC), or the rules' micro-batches, or None.

    An entry from another card's table gets its micro-batches from this card's rules, because they depend on the L2
    cache.
    """
    n, h, w, _ = shape
    gpu = cards.gpu_of(device)
    found = dispatch.tuned(gpu).network(plan.architecture.name, n, h, w, dtype_name(dtype))
    if found is not None and found.microseconds:
        return found
    ruled = micro_batches(plan.architecture, shape, dtype, gpu, launch.float32_precision())
    if found is None or ruled is None:
        return found or ruled
    return replace(found, through=ruled.through, images=ruled.images)


def in_micro_batches(how: Network, batch: int, outputs: Sequence[str]) -> bool:
    """Return True if the first stages run in micro-batches. They do not if the caller wants values from within them."""
    return 0 < how.images < batch and {LOGITS, POOLED}.issuperset(outputs)


def pack(plan: Plan) -> Plan:
    """Return the plan with weights in the kernels' layouts: the stem's padded, small groups merged into dense ones."""
    steps: list[Step] = []
    for step in plan:
        if isinstance(step, Stem):
            step = replace(step, weight=stem.pack_stem_weight(step.weight))
        elif isinstance(step, Conv) and step.groups > 1:
            weight, groups = grouping.merge_groups(step.weight, step.groups)
            step = replace(step, weight=weight, groups=groups)
        steps.append(step)
    return replace(plan, steps=tuple(steps))


def describe(step: Step, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[str, str, str]:
    """Return kernel, configuration and note of ``step`` on an input of ``shape``, for :meth:`fastres.Model.explain`."""
    gpu = cards.gpu_of(device)
    if isinstance(step, Stem):
        config = rules.route_stem(step.weight.shape[0], step.conv_shape(shape)[:3], dtype, gpu, step.pool)
        return config.kernel, str(config), ""
    if isinstance(step, Head):
        _, h, w, c = shape
        pool = rules.route_pool(c, h * w)
        if not step.weight.shape[0]:
            return pool.kernel, str(pool), ""
        routed = _route(step, shape, dtype, device)
        return f"{pool.kernel}, {routed.kernel}", f"{pool}; {routed}", routed.note
    if isinstance(step, (Pool, SqueezeExcite)):
        kernels = "window_pool" if isinstance(step, Pool) else "average_pool, conv, conv, gate"
        return kernels, str(rules.route_window_pool(shape[3])), ""
    if isinstance(step, Joined):
        found = dispatch.route_block(block_of(step, shape, dtype), dtype, gpu)
        assert found, step.name
        return found.config.kernel, str(found.config), f"{len(step.parts)} convolutions in one kernel"
    assert isinstance(step, Conv)
    sizes = conv_shape(step, shape)
    routed = _route(step, shape, dtype, device)
    note = f"{step.groups} groups run as {sizes.groups} block-diagonal ones" if sizes.groups != step.groups else ""
    return routed.kernel, str(routed), "; ".join(filter(None, (note, routed.note)))


def _strides(shape: Shape) -> tuple[int, ...]:
    """Return the contiguous strides of ``shape``, in elements."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)


def _public(value: Tensor) -> Tensor:
    """Return an NHWC value as the NCHW, channels-last tensor that PyTorch users expect."""
    return value.permute(0, 3, 1, 2) if value.dim() == 4 else value
