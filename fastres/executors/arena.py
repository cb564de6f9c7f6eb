"""Place the intermediate values of a call in one buffer, by their lifetimes in the Plan.

A value occupies its place from the step that writes it to the last step that reads it. If no later step reads a
convolution's residual, the convolution overwrites it: the kernel reads each residual element and writes the output
element with the same index.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fastres.network.plan import Conv, Head, Joined, Shape, SqueezeExcite, Step, last_reads

# Offsets are multiples of this many elements, so that every value starts on a 128-byte line in any dtype.
ALIGNMENT = 128


@dataclass(frozen=True)
class Arena:
    """The offsets of the values in the buffer and the size of the buffer, both in elements."""

    offsets: Mapping[str, int]
    size: int


def plan_arena(steps: Sequence[Step], shapes: Mapping[str, Shape], keep: Collection[str] = ()) -> Arena:
    """Place every value that ``steps`` write, except those in ``keep``, which have their own memory.

    The input and the head's outputs are not intermediate values and are not placed. The largest values are placed
    first, each at the lowest offset that is free for as long as it is needed. So the buffer is hardly larger than the
    values that are needed at the same time, and the caches hold more of it.
    """
    spans = _spans(steps, shapes, keep)
    placed: list[tuple[int, _Span]] = []
    offsets: dict[str, int] = {}
    for span in sorted(spans, key=lambda span: span.size, reverse=True):
        occupied = [(start, start + other.size) for start, other in placed if other.overlaps(span)]
        start = _first_gap(occupied, span.size)
        placed.append((start, span))
        offsets.update(dict.fromkeys(span.values, start))
    order = [value for span in spans for value in span.values]
    return Arena(
        {value: offsets[value] for value in order}, max((start + span.size for start, span in placed), default=0)
    )


@dataclass
class _Span:
    """A place: the values in it, one after another, the first step that writes it, the last that reads it, its size."""

    values: list[str]
    first: int
    last: int
    size: int

    def overlaps(self, other: _Span) -> bool:
        return self.first <= other.last and other.first <= self.last


def _spans(steps: Sequence[Step], shapes: Mapping[str, Shape], keep: Collection[str]) -> list[_Span]:
    last_read = last_reads(steps)
    spans: dict[str, _Span] = {}  # by the value that is in the place now
    found: list[_Span] = []
    for index, step in enumerate(steps):
        for value in () if isinstance(step, Head) else step.writes:
            if value in keep:
                continue
            size, residual = rounded_up(math.prod(shapes[value])), _overwritable(step) if value == step.output else None
            span = spans.get(residual or "")
            if residual and span and last_read[residual] == index and span.size == size:
                span.values.append(value)
                span.last = last_read[value]
            else:
                span = _Span([value], index, last_read[value], size)
                found.append(span)
            spans[value] = span
    return found


def _overwritable(step: Step) -> str | None:
    """Return the value that the step's output may overwrite: the residual, which is read element by element."""
    if isinstance(step, Joined):
        step = step.last if step.shortcut is None else step
    return step.residual if isinstance(step, (Conv, SqueezeExcite)) else None


def rounded_up(elements: int) -> int:
    """Return the next multiple of :data:`ALIGNMENT`."""
    return -(-elements // ALIGNMENT) * ALIGNMENT


def _first_gap(spans: Collection[tuple[int, int]], elements: int) -> int:
    """Return the lowest offset at which ``elements`` fit between the spans in use."""
    start = 0
    for low, high in sorted(spans):
        if low - start >= elements:
            return start
        start = max(start, high)
    return start
