"""Run the steps of a plan on oneDNN's primitives directly, in memory that is prepared once.

For a shape of images, every convolution and pool becomes a primitive (:mod:`fastres.onednn`), and every value gets a
place in one block of memory, by its lifetime in the plan. A call then only runs the primitives, one after another. A
convolution with a residual overwrites it. The other steps run as torch's operators, and their results are copied to
their places. The values are channels-last, or in blocks of channels (:mod:`fastres.executors.layouts`).

Threads that call at the same time each get a block of their own. A block serves all shapes.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from fastres.forks import Guard
from fastres.kernels.routing.without import VARIABLE, left_out
from fastres.network.plan import LOGITS, POOLED, Conv, Head, Plan, Pool, Shape, Stem, Step
from fastres.onednn import library as onednn
from fastres.onednn import loop
from fastres.onednn.library import Library
from fastres.onednn.objects import Operation, Packed
from fastres.onednn.primitives import Builder

from .arena import plan_arena, rounded_up
from .direct_runs import Observer, Owner, Part, Place, Prepared, Workspace
from .layouts import can_be_blocked, is_faster_blocked
from .packing import COPIES_KEPT
from .recent import Recent

# Number of shapes whose primitives are kept, as long as their weights take at most COPIES_KEPT times the memory of the
# plan's own. Shapes with the same layouts share weights.
SHAPES_KEPT = 32
# Blocks that are kept for the next calls: as many as threads can use at once, if they are not larger than this. Whole
# batches need more only for values from inside the network, or for very large images.
WORKSPACES_KEPT = os.cpu_count() or 1
LARGEST_KEPT = 256 * 2**20

_CONVOLVED = " before the pool"  # appended to the name of the stem's output


def absent() -> str | None:
    """Return why torch's operators run networks on this CPU, and not oneDNN's primitives; ``None`` if these do.

    Raises ``KernelError`` for an unknown name in ``FASTRES_WITHOUT``.
    """
    return f"{VARIABLE} leaves out primitives" if "primitives" in left_out() else onednn.absent()


def description() -> str:
    """Say which oneDNN runs networks on this CPU, and how."""
    reason = absent()
    if reason:
        return f"through torch's operators: {reason}"
    one_by_one = f"{VARIABLE} leaves out loop" if "loop" in left_out() else loop.absent()
    return f"{onednn.library().number}, called directly{f', one by one: {one_by_one}' if one_by_one else ''}"


class Direct:
    """Runs the plan of ``owner`` on oneDNN's primitives. It does not keep its owner alive."""

    def __init__(self, library: Library, owner: Owner, plan: Plan) -> None:
        self.library, self._plan = library, plan
        self._owner: Owner = weakref.proxy(owner)
        self._guard = Guard()
        self.kept: Recent[tuple[Shape, int, tuple[str, ...]], Prepared] = Recent(SHAPES_KEPT)
        self._known: dict[str, list[Packed]] = {}
        self._most_bytes = COPIES_KEPT * sum(step.weight.nbytes for step in plan if isinstance(step, (Stem, Conv)))
        self._idle: list[Workspace] = []
        blocked = "blocks" not in left_out() and can_be_blocked(plan, library.lanes)
        # Both are read when a shape is prepared. Without lanes, activations are always channels-last.
        self.lanes = library.lanes if blocked else None
        self.machine_code = "loop" not in left_out()
        self.observe: Observer | None = None

    def run(self, prepared: Prepared, values: dict[str, Tensor]) -> Tensor | None:
        """Run ``prepared`` on ``values["input"]``, and add its outputs to ``values``.

        Returns 0 for each image that is finite, and NaN for the others; ``None`` if all are.
        """
        workspace = self._take()
        try:
            return workspace.run_of(prepared, self.library, self._owner)(values, self.observe)
        finally:
            self._give_back(workspace)

    @property
    def weight_bytes(self) -> int:
        """The memory of all packed weights. A block is kept as long as one of its weights is."""
        return sum(dict(packed.block for layouts in self._known.values() for packed in layouts).values())

    def _take(self) -> Workspace:
        with self._guard:
            if self._idle:
                return self._idle.pop()
        return Workspace()

    def _give_back(self, workspace: Workspace) -> None:
        with self._guard:
            if len(self._idle) < WORKSPACES_KEPT and workspace.size <= LARGEST_KEPT:
                self._idle.append(workspace)

    def prepared_for(self, shape: Shape, outputs: tuple[str, ...]) -> Prepared:
        """Return the primitives that compute ``outputs`` for images of ``shape`` (NHWC)."""
        # The layouts also depend on the number of threads. Asking for it sets that of OpenMP in a new thread.
        key = (shape, torch.get_num_threads(), outputs)
        with self._guard:
            if key in self.kept:
                return self.kept.keep(key, self.kept[key])
            with torch.inference_mode(False), torch.no_grad():
                prepared = self.kept.keep(key, self._prepare(shape, outputs))
            self._forget_weights()
            return prepared

    def _forget_weights(self) -> None:
        """Drop the least recent shapes while all weights take too much memory, and weights that no shape uses."""
        while True:
            used = set[Packed]().union(*(prepared.weights for prepared in self.kept.values()))
            self._known = {name: [packed for packed in some if packed in used] for name, some in self._known.items()}
            if len(self.kept) <= 1 or self.weight_bytes <= self._most_bytes:
                return
            self.kept.popitem(last=False)

    def _prepare(self, shape: Shape, outputs: tuple[str, ...]) -> Prepared:
        lanes = self.lanes
        if lanes is not None and is_faster_blocked(shape, lanes, self._plan.head.weight.shape[1]):
            blocked = self.prepare_in(lanes, shape, outputs)
            if not any(operation.is_slow for part in blocked.parts for operation in part.operations):
                return blocked
        return self.prepare_in(None, shape, outputs)

    def prepare_in(self, block: int | None, shape: Shape, outputs: tuple[str, ...]) -> Prepared:
        """Return the primitives for activations in blocks of ``block`` channels; channels-last for ``None``."""
        steps = _divided(self._plan.steps_for(outputs), self._owner)
        stem = self._plan.stem
        shapes = {**self._plan.shapes(*shape[:3]), stem.output + _CONVOLVED: stem.conv_shape(shape)}
        kept = [name for name in dict.fromkeys(outputs) if name not in (LOGITS, POOLED)]
        places, size = self._places([step for _, step in steps], shapes, kept)
        images = None
        if self._owner.read_dtype is not None:
            images = Place(size, shape, self._owner.read_dtype)
            size += rounded_up(prod(shape) * images.dtype.itemsize)
        builder = Builder(self.library, block)
        parts, packed = [], {}
        for index, step in steps:
            operations = tuple(self._operations(builder, step, shapes, LOGITS in outputs))
            if not operations:
                packed[step.name] = self._owner.pack_one(step, shapes[step.input])
            parts.append(Part(index, step, shapes[step.input], operations))
        builder.pack()
        most = max((operation.scratchpad_bytes for part in parts for operation in part.operations), default=0)
        return Prepared(tuple(parts), places, images, outputs, packed, size, size + most, block, self.machine_code)

    def _places(
        self, steps: Sequence[Step], shapes: dict[str, Shape], kept: Sequence[str]
    ) -> tuple[dict[str, Place], int]:
        """Return the places of all values, and the size of their memory. Values in ``kept`` stay until the end."""
        dtypes = {name: self._dtype_of(name) for name in shapes}
        sizes = {name: (prod(shape) * dtypes[name].itemsize,) for name, shape in shapes.items()}
        arena = plan_arena(steps, sizes, kept)
        offsets, size = dict(arena.offsets), arena.size
        for name in kept:
            offsets[name] = size
            size += rounded_up(sizes[name][0])
        return {name: Place(offset, shapes[name], dtypes[name]) for name, offset in offsets.items()}, size

    def _dtype_of(self, name: str) -> torch.dtype:
        return self._owner.value_dtype(name.removesuffix(_CONVOLVED))

    def _operations(
        self, builder: Builder, step: Step, shapes: dict[str, Shape], classify: bool
    ) -> Iterator[Operation]:
        """Yield the primitives that compute ``step``: none if torch's operators do."""
        if not self._owner.is_direct(step):
            return
        shape, output = shapes[step.input], shapes[step.output]
        known, dtype = self._known.setdefault(step.name, []), self._dtype_of(step.input)
        if isinstance(step, Pool):
            kernel, padding = ((3, 3), 1) if step.mode == "max" else ((2, 2), 0)
            yield builder.pool(shape, output, step.mode, dtype, kernel=kernel, stride=2, padding=padding)
        elif isinstance(step, Head):
            yield builder.averages(shape, dtype, self._owner.scale_of(step.input))
            if classify and step.weight.shape[0]:
                levels = self._owner.levels_of(step)
                if levels is not None:
                    yield builder.levels(shape[0], shape[3], levels.input)
                yield builder.product(shape[0], step.weight, step.bias, known, levels)
        else:
            assert isinstance(step, (Stem, Conv))
            levels, padding = self._owner.levels_of(step), step.padding
            if isinstance(step, Stem) and levels is not None:
                pixels = self._owner.pixels
                assert pixels is not None
                yield builder.pixels(shape, pixels.scales, pixels.shifts)
                yield builder.bordered(shape, padding)
                n, h, w, c = shape
                shape, padding = (n, h + 2 * padding, w + 2 * padding, c), 0
            yield builder.convolution(
                shape,
                output,
                step.weight,
                step.bias,
                known=known,
                stride=step.stride,
                padding=padding,
                groups=1 if isinstance(step, Stem) else step.groups,
                relu=isinstance(step, Stem) or step.relu,
                add=isinstance(step, Conv) and step.residual is not None,
                levels=levels,
            )


def _divided(steps: Sequence[Step], owner: Owner) -> list[tuple[int, Step]]:
    """Return the steps with their indices, and a stem with a pool as two steps, if primitives compute it."""
    divided: list[tuple[int, Step]] = list(enumerate(steps))
    stem = steps[0]
    if isinstance(stem, Stem) and stem.pool and owner.is_direct(stem):
        convolved = stem.output + _CONVOLVED
        pool = Pool(f"{stem.name} pool", convolved, stem.output, stem.weight, stem.bias, mode="max")
        divided[:1] = [(0, replace(stem, output=convolved, pool=False)), (0, pool)]
    return divided
