"""Passes that transform a Plan: join convolutions that one kernel can compute.

A run of neighbouring steps around a block's last convolution can be joined (see :class:`fastres.network.plan.Joined`).
The caller knows from measurements how much time each run saves. Of all ways to cover the plan with runs and single
steps, :func:`join` takes the one that saves the most time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch

from fastres.network.plan import Conv, Joined, Plan, Step

# Runs of steps that can be joined, by the index of their first step.
Candidates = dict[int, list[Joined]]


def joinable(steps: Sequence[Step]) -> Candidates:
    """Return every run in ``steps`` that can be joined. Weights are merged here, once for each shortcut."""
    readers: dict[str, int] = {}
    for step in steps:
        for value in step.reads:
            readers[value] = readers.get(value, 0) + 1
    found: Candidates = {}
    for index, last in enumerate(steps):
        if isinstance(last, Conv) and last.groups == 1 and last.residual is not None:
            for start, run in _runs(steps, index, last, readers):
                found.setdefault(start, []).append(run)
    return found


def _runs(steps: Sequence[Step], index: int, last: Conv, readers: dict[str, int]) -> Iterator[tuple[int, Joined]]:
    """Yield every run around the convolution ``last`` at ``index``, with the index of the run's first step."""
    before = steps[index - 1]
    shortcut = before if isinstance(before, Conv) and _is_projection(before, last, readers) else None
    start = index if shortcut is None else index - 1
    alone = joined(last, shortcut=shortcut)
    if shortcut is not None:
        yield start, alone
    first = steps[start - 1]
    if not (isinstance(first, Conv) and _feeds(first, last, readers)):
        return
    run = replace(alone, name=_name(first, last), input=first.input, first=first)
    yield start - 1, run
    following = steps[index + 1]
    if isinstance(following, Conv) and _follows(following, last):
        yield start - 1, replace(run, name=_name(first, following), following=following)


def joined(
    last: Conv, first: Conv | None = None, shortcut: Conv | None = None, following: Conv | None = None
) -> Joined:
    """Return the joined step of these convolutions, with merged weights."""
    weight, bias = last.weight.flatten(1), last.bias
    if shortcut is not None:
        weight, bias = torch.cat([weight, shortcut.weight.flatten(1)], 1), bias + shortcut.bias
    begin = first or shortcut or last
    source = last.input if first is None else first.input
    name = _name(begin, following or last)
    return Joined(name, source, last.output, weight, bias, last, first, shortcut, following)


def _name(first: Conv, last: Conv) -> str:
    return f"{first.name} … {last.name}"


def _is_1x1(conv: Conv) -> bool:
    return conv.weight.shape[1:3] == (1, 1) and conv.padding == 0 and conv.groups == 1


def _is_projection(shortcut: Conv, last: Conv, readers: dict[str, int]) -> bool:
    """Return True if ``shortcut`` is a 1×1 projection of any stride that only ``last`` reads, as its residual."""
    alone = last.residual == shortcut.output and readers[shortcut.output] == 1
    return alone and _is_1x1(shortcut) and not shortcut.relu and shortcut.residual is None


def _feeds(first: Conv, last: Conv, readers: dict[str, int]) -> bool:
    """Return True if ``last`` is a 1×1 convolution of the output of ``first``, and nothing else reads that output."""
    alone = first.output == last.input and readers[first.output] == 1
    plain = first.relu and first.residual is None and first.groups == 1
    return alone and plain and _is_1x1(last) and last.stride == 1 and last.relu


def _follows(following: Conv, last: Conv) -> bool:
    """Return True if ``following`` is a 1×1 convolution of the output of ``last``, at the same pixels."""
    plain = following.relu and following.residual is None and following.stride == 1
    return following.input == last.output and plain and _is_1x1(following)


def cover(
    steps: Sequence[Step], candidates: Candidates, saves: Callable[[Joined], float], keep: Collection[str] = ()
) -> tuple[Step, ...]:
    """Join the runs of ``candidates`` that together save the most time, and return the steps.

    ``saves`` returns the time that a run saves compared with its single steps, in any unit. Runs that save nothing are
    not joined, and neither are runs that would not write a value in ``keep``.
    """
    total = [0.0] * (len(steps) + 1)
    choice: list[Joined | None] = [None] * len(steps)
    for index in reversed(range(len(steps))):
        total[index] = total[index + 1]
        for run in candidates.get(index, ()):
            end = index + len(run.parts)
            hidden = {part.output for part in run.parts} - set(run.writes)
            if end > len(steps) or hidden & set(keep):
                continue
            saved = saves(run)
            if saved > 0 and saved + total[end] > total[index]:
                total[index], choice[index] = saved + total[end], run
    covered: list[Step] = []
    index = 0
    while index < len(steps):
        covered.append(choice[index] or steps[index])
        index += len(covered[-1].parts)
    return tuple(covered)


def join(plan: Plan, saves: Callable[[Joined], float], keep: Collection[str] = ()) -> Plan:
    """Join the runs that together save the most time, and return the plan; see :func:`cover`.

    The values named in ``keep`` are still written. The joined plan gives the same results as ``plan``. Only GPUs of the
    sm_90 family have kernels for joined steps.
    """
    return replace(plan, steps=cover(plan.steps, joinable(plan.steps), saves, keep))
