"""Place the intermediate values of a call in one buffer, by their lifetimes in the Plan.

A value occupies its place from the step that writes it to the last step that reads it. If no later step reads a
convolution's residual, the convolution overwrites it: the kernel reads each residual element and writes the output
element with the same index.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fastres.network.plan import INPUT, Conv, Head, Joined, Shape, SqueezeExcite, Step, last_reads

# Offsets are multiples of this many elements, so that every value starts on a 128-byte line in any dtype.
ALIGNMENT = 128


@dataclass(frozen=True)
class Arena:
    """The offsets of the values in the buffer and the size of the buffer, both in elements."""

    offsets: Mapping[str, int]
    size: int


def plan_arena(steps: Sequence[Step], shapes: Mapping[str, Shape], keep: Collection[str] = ()) -> Arena:
    """Place every value that ``steps`` write, except those in ``keep``, which have their own memory.

    The input and the head's outputs are not intermediate values and are not placed.
    """
    last_read = last_reads(steps)
    offsets: dict[str, int] = {}
    live: dict[str, tuple[int, int]] = {}  # value → [start, end)
    size = 0
    for index, step in enumerate(steps):
        residual = _overwritable(step)
        for value in () if isinstance(step, Head) else step.writes:
            if value in keep:
                continue
            elements = _aligned(math.prod(shapes[value]))
            place = live.get(residual or "") if value == step.output else None
            if residual and place and last_read[residual] == index and place[1] - place[0] == elements:
                start = place[0]
                del live[residual]
            else:
                start = _first_gap(live.values(), elements)
            offsets[value] = start
            live[value] = (start, start + elements)
            size = max(size, start + elements)
        for value in step.reads:
            if value != INPUT and last_read[value] == index:
                live.pop(value, None)
    return Arena(offsets, size)


def _overwritable(step: Step) -> str | None:
    """Return the value that the step's output may overwrite: the residual, which is read element by element."""
    if isinstance(step, Joined):
        step = step.last if step.shortcut is None else step
    return step.residual if isinstance(step, (Conv, SqueezeExcite)) else None


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


def _first_gap(spans: Collection[tuple[int, int]], elements: int) -> int:
    """Return the lowest offset at which ``elements`` fit between the spans in use."""
    start = 0
    for low, high in sorted(spans):
        if low - start >= elements:
            return start
        start = max(start, high)
    return start
