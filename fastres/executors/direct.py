"""Run the steps of a plan on oneDNN's primitives directly, in memory that is prepared once.

For a shape of images, every convolution and pool becomes a primitive (:mod:`fastres.onednn`), and every value gets a
place in one block of memory, by its lifetime in the plan. A call then only runs the primitives, one after another. A
convolution with a residual overwrites it. The other steps run as torch's operators, and their results are copied to
their places.

Threads that call at the same time each get a block of their own. A block serves all shapes.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from fastres.forks import Guard
from fastres.network.plan import INPUT, LOGITS, POOLED, Conv, Plan, Pool, Shape, Stem, Step
from fastres.onednn.library import Library
from fastres.onednn.primitives import (
    Builder,
    Levels,
    Operation,
    Owned,
    Packed,
    aligned,
    bound,
    memory,
    new_stream,
)

from .arena import plan_arena
from .packing import COPIES_KEPT
from .recent import Recent

# Number of shapes whose primitives are kept, as long as their weights take at most COPIES_KEPT times the memory of the
# plan's own. Shapes with the same layouts share weights.
SHAPES_KEPT = 32

# Called in the place of each step, with the number of images and a function that runs it: to take times.
Observer = Callable[[Step, int, Callable[[], None]], None]

_CONVOLVED = " before the pool"  # appended to the name of the stem's output


class Owner(Protocol):
    """The executor: what it knows of its steps, and how it runs one on torch's operators."""

    dtype: torch.dtype

    def value_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the plan's value ``name``."""

    def is_direct(self, step: Step) -> bool:
        """Return True if primitives compute ``step``, and not torch's operators."""

    def levels_of(self, step: Stem | Conv) -> Levels | None:
        """Return the scales of a convolution in 8 bit; ``None`` if it is not."""

    def stem_input(self, x: Tensor) -> Tensor:
        """Return the channels-last input of the stem's convolution, for the images of a call."""

    def pack_one(self, step: Step, shape: Shape) -> Any:
        """Return ``step`` packed for torch's operators and an input of ``shape``; ``None`` if there is nothing to."""

    def run_step(
        self, step: Step, values: dict[str, Tensor], index: int, packed: dict[str, Any], outputs: Sequence[str]
    ) -> None:
        """Compute the plan's ``index``-th step from ``values`` on torch's operators, and add its outputs to them."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where a value is in the block, from which byte, and what it is."""

    offset: int
    shape: Shape
    dtype: torch.dtype

    def view(self, block: Tensor) -> Tensor:
        """Return the value as a channels-last tensor ``[N, C, H, W]`` in ``block``."""
        size = prod(self.shape) * self.dtype.itemsize
        flat = block[self.offset : self.offset + size].view(self.dtype)
        return flat.view(self.shape).permute(0, 3, 1, 2)


@dataclass(frozen=True, eq=False)
class Part:
    """A step with its primitive, which is ``None`` if torch's operators compute it, and its index in the plan."""

    index: int
    step: Step
    operation: Operation | None


@dataclass(frozen=True, eq=False)
class Prepared:
    """The steps for one shape, and the places of their values. ``packed`` is for the steps on torch's operators."""

    parts: tuple[Part, ...]
    places: dict[str, Place]
    outputs: tuple[str, ...]
    packed: dict[str, Any]
    scratchpad: int  # its offset in the block
    size: int  # of the block

    @property
    def weights(self) -> set[Packed]:
        """The packed weights, of which several steps of other shapes may use the same."""
        return {part.operation.packed for part in self.parts if part.operation and part.operation.packed}


class Direct:
    """Runs the plan of ``owner`` on oneDNN's primitives. It does not keep its owner alive."""

    def __init__(self, library: Library, owner: Owner, plan: Plan) -> None:
        self._library, self._plan = library, plan
        self._owner: Owner = weakref.proxy(owner)
        self._guard = Guard()
        self.kept: Recent[tuple[Any, ...], Prepared] = Recent(SHAPES_KEPT)
        self._known: dict[str, list[Packed]] = {}
        self._most_bytes = COPIES_KEPT * sum(step.weight.nbytes for step in plan if isinstance(step, (Stem, Conv)))
        self._idle: list[Workspace] = []
        self.observe: Observer | None = None

    def run(self, values: dict[str, Tensor], shape: Shape, outputs: Sequence[str]) -> None:
        """Compute ``outputs`` from ``values["input"]``, for images of ``shape`` (NHWC), and add them to ``values``."""
        prepared = self._prepared_for(shape, tuple(outputs))
        workspace = self._take()
        try:
            workspace.run_of(prepared, self._library, self._owner)(values, self.observe)
        finally:
            self._give_back(workspace)

    @property
    def weight_bytes(self) -> int:
        """The memory of all packed weights."""
        return sum(packed.data.nbytes for layouts in self._known.values() for packed in layouts)

    def _take(self) -> Workspace:
        with self._guard:
            if self._idle:
                return self._idle.pop()
        return Workspace()

    def _give_back(self, workspace: Workspace) -> None:
        with self._guard:
            if len(self._idle) < (os.cpu_count() or 1):
                self._idle.append(workspace)

    def _prepared_for(self, shape: Shape, outputs: tuple[str, ...]) -> Prepared:
        # The layouts also depend on the number of threads. Asking for it sets that of OpenMP in a new thread.
        kept = tuple(sorted({*outputs} - {LOGITS, POOLED}))
        key = (shape, torch.get_num_threads(), len(self._plan.steps_for(outputs)), kept, LOGITS in outputs)
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
        steps = list(_divided(self._plan.steps_for(outputs), self._owner))
        shapes = {INPUT: shape}
        for _, step in steps:
            shapes.update(zip(step.writes, step.output_shapes(shapes[step.input]), strict=True))
        kept = [name for name in dict.fromkeys(outputs) if name not in (LOGITS, POOLED)]
        places, size = self._places([step for _, step in steps], shapes, kept)
        builder = Builder(self._library)
        parts, packed = [], {}
        for index, step in steps:
            operation = self._operation(builder, step, shapes) if self._owner.is_direct(step) else None
            if operation is None:
                packed[step.name] = self._owner.pack_one(step, shapes[step.input])
            parts.append(Part(index, step, operation))
        scratchpad = max((part.operation.scratchpad_bytes for part in parts if part.operation), default=0)
        return Prepared(tuple(parts), places, outputs, packed, size, size + scratchpad)

    def _places(
        self, steps: Sequence[Step], shapes: dict[str, Shape], kept: Sequence[str]
    ) -> tuple[dict[str, Place], int]:
        """Return the places of all values, and the size of their memory. Values in ``kept`` stay until the end."""
        dtypes = {name: self._owner.value_dtype(name.removesuffix(_CONVOLVED)) for name in shapes}
        sizes = {name: (prod(shape) * dtypes[name].itemsize,) for name, shape in shapes.items()}
        arena = plan_arena(steps, sizes, kept)
        offsets, size = dict(arena.offsets), arena.size
        for name in kept:
            offsets[name] = size
            size += -(-sizes[name][0] // 128) * 128
        return {name: Place(offset, shapes[name], dtypes[name]) for name, offset in offsets.items()}, size

    def _operation(self, builder: Builder, step: Step, shapes: dict[str, Shape]) -> Operation:
        shape, output = shapes[step.input], shapes[step.output]
        if isinstance(step, Pool):
            kernel, padding = (3, 1) if step.mode == "max" else (2, 0)
            return builder.pool(shape, output, step.mode, kernel, padding, self._owner.value_dtype(step.output))
        assert isinstance(step, (Stem, Conv))
        levels, padding = self._owner.levels_of(step), step.padding
        if isinstance(step, Stem) and levels is not None:  # its input is padded already
            n, h, w, c = shape
            shape, padding = (n, h + 2 * padding, w + 2 * padding, c), 0
        return builder.convolution(
            shape,
            output,
            step.weight,
            step.bias,
            stride=step.stride,
            padding=padding,
            groups=1 if isinstance(step, Stem) else step.groups,
            relu=isinstance(step, Stem) or step.relu,
            add=isinstance(step, Conv) and step.residual is not None,
            dtype=self._owner.dtype,
            known=self._known.setdefault(step.name, []),
            levels=levels,
        )


def _divided(steps: Sequence[Step], owner: Owner) -> Sequence[tuple[int, Step]]:
    """Return the steps with their indices, and a stem with a pool as two steps, if primitives compute it."""
    divided: list[tuple[int, Step]] = list(enumerate(steps))
    stem = steps[0]
    if isinstance(stem, Stem) and stem.pool and owner.is_direct(stem):
        convolved = stem.output + _CONVOLVED
        pool = Pool(f"{stem.name} pool", convolved, stem.output, stem.weight, stem.bias, mode="max")
        divided[:1] = [(0, replace(stem, output=convolved, pool=False)), (0, pool)]
    return divided


class Workspace:
    """A block of memory, and the prepared steps that run in it. One thread uses it at a time."""

    def __init__(self) -> None:
        self._block = aligned(0)
        self._runs: weakref.WeakKeyDictionary[Prepared, Run] = weakref.WeakKeyDictionary()

    def run_of(self, prepared: Prepared, library: Library, owner: Owner) -> Run:
        """Return ``prepared``, ready to run in this memory."""
        run = self._runs.get(prepared)
        if run is None:
            with torch.inference_mode(False), torch.no_grad():
                if self._block.nbytes < prepared.size:
                    self._runs.clear()
                    self._block = aligned(0)  # frees the memory before the process gets more
                    self._block = aligned(prepared.size)
                run = self._runs[prepared] = Run(prepared, self._block, library, owner)
        return run


class Run:
    """Prepared steps in a block of memory."""

    def __init__(self, prepared: Prepared, block: Tensor, library: Library, owner: Owner) -> None:
        self._outputs = prepared.outputs
        self._views = {name: place.view(block) for name, place in prepared.places.items()}
        self._given = _Given()
        self._kept: list[object] = []
        stream, scratchpad = new_stream(library), block.data_ptr() + prepared.scratchpad
        groups: dict[int, tuple[Step, list[Callable[[], object]]]] = {}
        for part in prepared.parts:
            step, operation = part.step, part.operation
            _, calls = groups.setdefault(part.index, (step, []))
            if operation is None:
                rest = (step, part.index, prepared.packed, prepared.outputs)
                calls.append(partial(_run_operators, self._given, self._views, owner, *rest))
                continue
            if isinstance(step, Stem):
                source = memory(library, operation.source, 0)
                calls.append(partial(_feed, self._given, library, owner, source))
            else:
                source = memory(library, operation.source, self._views[step.input].data_ptr())
            if isinstance(step, Conv) and step.residual is not None:
                residual, output = self._views[step.residual], self._views[step.output]
                if residual.data_ptr() != output.data_ptr():  # it is still needed: the sum goes to a copy
                    calls.append(partial(output.copy_, residual))
            destination = memory(library, operation.destination, self._views[step.output].data_ptr())
            calls.append(bound(library, operation, stream, source, destination, scratchpad, self._kept))
        self._steps = list(groups.values())
        self._calls = [call for _, calls in self._steps for call in calls]

    def __call__(self, values: dict[str, Tensor], observe: Observer | None) -> None:
        """Run all steps on ``values["input"]``, and add the outputs to ``values``."""
        self._given.values = values
        try:
            if observe is None:
                _run_all(self._calls)
            else:
                for step, calls in self._steps:
                    observe(step, values[INPUT].shape[0], partial(_run_all, calls))
        finally:
            self._given.values = {}
        for name in self._outputs:
            if name in self._views:
                values[name] = self._views[name].clone(memory_format=torch.channels_last)


@dataclass(eq=False)
class _Given:
    """What a call is about: its values. The functions of a run refer to this, and not to the run that owns them."""

    values: dict[str, Tensor] = field(default_factory=dict)


def _feed(given: _Given, library: Library, owner: Owner, source: Owned) -> None:
    """Have the stem read the images of this call."""
    x = owner.stem_input(given.values[INPUT])
    given.values[f"{INPUT} of the stem"] = x  # lives until the call ends
    library.memory_set_data_handle(source, x.data_ptr())


def _run_operators(
    given: _Given,
    views: dict[str, Tensor],
    owner: Owner,
    step: Step,
    index: int,
    packed: dict[str, Any],
    outputs: Sequence[str],
) -> None:
    """Compute a step on torch's operators, and copy its results to their places."""
    values = {**views, INPUT: given.values[INPUT]}
    owner.run_step(step, values, index, packed, outputs)
    for name, value in values.items():
        view = views.get(name)
        if view is None:
            given.values[name] = value
        elif value is not view:
            view.copy_(value)


def _run_all(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()
