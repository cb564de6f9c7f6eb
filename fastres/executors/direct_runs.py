"""Prepared steps and the memory in which they run: the inner part of :mod:`fastres.executors.direct`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from fastres.network.plan import INPUT, LOGITS, POOLED, Conv, Head, Shape, Stem, Step
from fastres.onednn.library import Library
from fastres.onednn.objects import Operation, Packed, aligned
from fastres.onednn.primitives import Levels

from .binding import Binder, Call, Routine
from .pixels import Pixels
from .reading import Preparer, Reader

# Called in the place of each step, with the number of images and a function that runs it: to take times.
Observer = Callable[[Step, int, Callable[[], None]], None]


class Owner(Preparer, Protocol):
    """The executor: what it knows of its steps, and how it runs one on torch's operators.

    ``read_dtype`` is that of the images that the first step reads, ``None`` if it reads them as they are given, and
    ``pixels`` makes the input of a stem in 8 bit.
    """

    read_dtype: torch.dtype | None
    pixels: Pixels | None

    def value_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the plan's value ``name``."""

    def scale_of(self, name: str) -> float:
        """Return what one level of the value ``name`` stands for; 1 if it is not in 8 bit."""

    def is_direct(self, step: Step) -> bool:
        """Return True if primitives compute ``step``, and not torch's operators."""

    def levels_of(self, step: Stem | Conv | Head) -> Levels | None:
        """Return the scales of a step in 8 bit; ``None`` if it is not."""

    def pack_one(self, step: Step, shape: Shape) -> Any:
        """Return ``step`` packed for torch's operators and an input of ``shape``; ``None`` if there is nothing to."""

    def run_step(
        self, step: Step, values: dict[str, Tensor], index: int, packed: dict[str, Any], outputs: Sequence[str]
    ) -> None:
        """Compute the plan's ``index``-th step from ``values`` on torch's operators, and add its outputs to them."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where a value is in the block of memory, from which byte, and what it is."""

    offset: int
    shape: Shape  # NHWC
    dtype: torch.dtype

    def view(self, block: Tensor) -> Tensor:
        """Return the memory of the value in ``block``: a channels-last tensor ``[N, C, H, W]`` if the value is one."""
        size = prod(self.shape) * self.dtype.itemsize
        flat = block[self.offset : self.offset + size].view(self.dtype)
        return flat.view(self.shape).permute(0, 3, 1, 2)

    def planes(self, block: Tensor) -> Tensor:
        """Return the memory of images in ``block`` as a contiguous tensor ``[N, C, H, W]``."""
        n, h, w, c = self.shape
        return self.view(block).permute(0, 2, 3, 1).reshape(n, c, h, w)

    def copy(self, view: Tensor, channels: int | None) -> Tensor:
        """Return the value in ``view``, in blocks of ``channels``, as a new channels-last tensor ``[N, C, H, W]``."""
        if channels is None:
            return view.clone(memory_format=torch.channels_last)
        n, h, w, c = self.shape
        blocks = view.permute(0, 2, 3, 1).view(n, c // channels, h, w, channels)
        copied = blocks.permute(0, 2, 3, 1, 4).clone(memory_format=torch.contiguous_format)
        return copied.view(n, h, w, c).permute(0, 3, 1, 2)


@dataclass(frozen=True, eq=False)
class Part:
    """A step with its primitives, none if torch's operators compute it, and its index in the plan.

    A head has the averages and, if it classifies, the product: in 8 bit, after the rounding of its input. A stem
    in 8 bit first has the rounding of its input to pixels, and their copy into a picture with a border.
    """

    index: int
    step: Step
    shape: Shape  # of its input, NHWC
    operations: tuple[Operation, ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """The steps for one shape, and the places of their values. ``packed`` is for the steps on torch's operators."""

    parts: tuple[Part, ...]
    places: dict[str, Place]
    images: Place | None  # for images in another form than the first step reads; ``None`` if it reads any
    outputs: tuple[str, ...]
    packed: dict[str, Any]
    scratchpad: int  # its offset in the block
    size: int  # of the block of memory
    channels: int | None  # in a block of channels; ``None`` for channels-last activations
    machine_code: bool  # runs the primitives; Python does without it

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of the images that a stem reads."""
        return torch.channels_last if self.channels is None else torch.contiguous_format

    @property
    def weights(self) -> set[Packed]:
        """The packed weights. Other shapes may use the same."""
        operations = (operation for part in self.parts for operation in part.operations)
        return {operation.packed for operation in operations if operation.packed}


class Workspace:
    """A block of memory, and the prepared steps that run in it. One thread uses it at a time."""

    def __init__(self) -> None:
        self._block = aligned(0)
        self._runs: weakref.WeakKeyDictionary[Prepared, Run] = weakref.WeakKeyDictionary()

    @property
    def size(self) -> int:
        """Its bytes."""
        return self._block.nbytes

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
        self._channels = prepared.channels
        self._copied = {name: prepared.places[name] for name in prepared.outputs if name in prepared.places}
        self._views = {name: place.view(block) for name, place in prepared.places.items()}
        self._given = _Given()
        binder = Binder(library, block.data_ptr() + prepared.scratchpad, prepared.machine_code)
        self._binder = binder
        self._owner, images, place = owner, prepared.images, None
        if images is not None:
            place = images.view(block) if prepared.channels is None else images.planes(block)
        self._reader = Reader(binder, prepared.parts[0].shape, place)
        groups: dict[int, tuple[Step, list[Call]]] = {}
        first: list[Call] = []  # what each call sets before the steps, so that nothing comes between them
        for part in prepared.parts:
            _, calls = groups.setdefault(part.index, (part.step, []))
            if not part.operations:
                rest = (part.step, part.index, prepared.packed, prepared.outputs)
                calls.append(partial(_run_operators, self._given, self._views, owner, *rest))
            elif isinstance(part.step, Stem):
                calls += _stem(binder, self._given, owner, part, self._views[part.step.output], first)
            elif isinstance(part.step, Head):
                calls += _head(binder, self._given, part, self._views[part.step.input], first)
            else:
                calls += _step(binder, part, self._views)
        self._first = binder.routine(first)
        self._steps = list(groups.values())
        self._all = binder.routine(call for _, calls in self._steps for call in calls)

    @cached_property
    def _one_by_one(self) -> list[tuple[Step, Routine]]:
        """A routine for each step, for calls that are observed."""
        return [(step, self._binder.routine(calls)) for step, calls in self._steps]

    def __call__(self, values: dict[str, Tensor], observe: Observer | None) -> Tensor | None:
        """Run all steps on ``values["input"]``, and add the outputs to ``values``. Return the images' guard."""
        given, owner = values[INPUT], self._owner
        images = self._reader.read(given, owner)
        guard = None if given.dtype == torch.uint8 else self._reader.guard(images)
        values[INPUT] = images
        self._given.values = values
        try:
            self._first()
            if observe is None:
                self._all()
            else:
                for step, run in self._one_by_one:
                    observe(step, values[INPUT].shape[0], run)
        finally:
            self._given.values = {}
        for name, place in self._copied.items():
            values[name] = place.copy(self._views[name], self._channels)
        return guard


@dataclass(eq=False)
class _Given:
    """What a call is about: its values. The functions of a run refer to this, and not to the run that owns them."""

    values: dict[str, Tensor] = field(default_factory=dict)


def _step(binder: Binder, part: Part, views: dict[str, Tensor]) -> list[Call]:
    """Return the calls that run a convolution or pool."""
    step, (operation,) = part.step, part.operations
    x, output = views[step.input], views[step.output]
    run = binder.bound(operation, *binder.memories(operation, x.data_ptr(), output.data_ptr()))
    if isinstance(step, Conv) and step.residual is not None:
        residual = views[step.residual]
        if residual.data_ptr() != output.data_ptr():  # it is still needed: the sum goes to a copy

            def copy() -> None:
                output.copy_(residual)

            return [copy, run]
    return [run]


def _stem(binder: Binder, given: _Given, owner: Owner, part: Part, output: Tensor, first: list[Call]) -> list[Call]:
    """Return the calls that run a stem's convolution on the images of a call. Add to ``first`` what comes before."""
    operation, library = part.operations[-1], binder.library
    source, destination = binder.memories(operation, destination=output.data_ptr())
    run = binder.bound(operation, source, destination)
    if len(part.operations) == 1:

        def read_images() -> None:
            library.memory_set_data_handle(source, given.values[INPUT].data_ptr())

        first.append(read_images)
        return [run]
    pixels, (rounding, arranging, _) = owner.pixels, part.operations
    assert pixels is not None
    picture = pixels.picture(*part.shape[:3])
    library.memory_set_data_handle(source, picture.data_ptr())
    n, h, w, c = part.shape
    levels = torch.empty((n, c, h, w), dtype=torch.uint8, device="cpu")
    binder.kept.append(levels)
    images, rounded = binder.memories(rounding, destination=levels.data_ptr())
    rounds = binder.bound(rounding, images, rounded)
    planes, inside = binder.memories(arranging, destination=pixels.inside(picture).data_ptr())
    arranges = binder.bound(arranging, planes, inside)
    arrange, round_and_arrange = binder.routine([arranges]), binder.routine([rounds, arranges])

    def read_levels() -> None:
        x = given.values[INPUT]
        if not x.is_contiguous():
            pixels.fill(picture, x)
        elif x.dtype == torch.uint8:
            library.memory_set_data_handle(planes, x.data_ptr())
            arrange()
        else:
            x = x.to(torch.float32)
            library.memory_set_data_handle(images, x.data_ptr())
            library.memory_set_data_handle(planes, levels.data_ptr())
            round_and_arrange()

    return [read_levels, run]


def _head(binder: Binder, given: _Given, part: Part, x: Tensor, first: list[Call]) -> list[Call]:
    """Return the calls that average ``x`` and classify the averages. In ``first``, both results get new memory."""
    library, (n, c, _, _) = binder.library, x.shape
    dtype = torch.float32 if x.dtype == torch.uint8 else x.dtype
    source, averages = binder.memories(part.operations[0], x.data_ptr())

    def make_averages() -> None:
        given.values[POOLED] = pooled = torch.empty((n, c), dtype=dtype, device="cpu")
        library.memory_set_data_handle(averages, pooled.data_ptr())

    first.append(make_averages)
    calls: list[Call] = [binder.bound(part.operations[0], source, averages)]
    classes = part.step.weight.shape[0]
    if len(part.operations) == 1:
        if not classes:

            def make_no_logits() -> None:
                given.values[LOGITS] = torch.empty((n, 0), dtype=torch.float32, device="cpu")

            first.append(make_no_logits)
        return calls
    read, written = binder.memories(part.operations[-1])
    product = binder.bound(part.operations[-1], read, written)
    rounded = None
    if len(part.operations) == 3:
        levels = torch.empty((n, c), dtype=torch.uint8, device="cpu")
        binder.kept.append(levels)
        library.memory_set_data_handle(read, levels.data_ptr())
        read, levels_of = binder.memories(part.operations[1], destination=levels.data_ptr())
        rounded = binder.bound(part.operations[1], read, levels_of)

    def make_logits() -> None:
        given.values[LOGITS] = logits = torch.empty((n, classes), dtype=torch.float32, device="cpu")
        library.memory_set_data_handle(read, given.values[POOLED].data_ptr())
        library.memory_set_data_handle(written, logits.data_ptr())

    first.append(make_logits)
    return [*calls, *([] if rounded is None else [rounded]), product]


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
