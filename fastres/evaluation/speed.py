"""How fast the candidates are: the time of one batch, from pixels to answers, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .candidates import Candidate

SECONDS = 1.0  # for each candidate
LEAST_TURNS, TURN_SECONDS = 5, 0.05  # in a turn, a candidate runs for this long, and at least once


@dataclass(frozen=True)
class Speed:
    """The times of one batch of ``batch`` images, from uint8 pixels to answers: quantiles over all turns.

    ``images_per_s`` is from the median. ``first_answer_s`` is the time from a loaded model, or an exported file, to the
    answers to the first batch.
    """

    batch: int
    images_per_s: float
    p20_ms: float
    p50_ms: float
    p80_ms: float
    first_answer_s: float


def measure(
    candidates: Sequence[Candidate],
    batches: Sequence[Any],
    first: Sequence[float],
    advance: Callable[[], object] = lambda: None,
) -> list[Speed]:
    """Time each candidate on its batch. ``first`` are the times of their first answers, in seconds.

    The candidates take turns, so that a disturbance of the machine meets all of them.
    """
    taken: list[list[float]] = [[] for _ in candidates]
    for candidate, batch in zip(candidates, batches, strict=True):
        candidate.run(batch)
    begun, limit, turns = time.perf_counter(), SECONDS * len(candidates), 0
    while turns < LEAST_TURNS or time.perf_counter() - begun < limit:
        for candidate, batch, times in zip(candidates, batches, taken, strict=True):
            end = time.perf_counter() + TURN_SECONDS
            while (start := time.perf_counter()) < end:
                candidate.run(batch)  # its answers are on the CPU, so a GPU has finished
                times.append(time.perf_counter() - start)
        turns += 1
        advance()
    found = []
    for batch, times, seconds in zip(batches, taken, first, strict=True):
        p20, p50, p80 = (float(value) for value in np.quantile(times, (0.2, 0.5, 0.8)))
        found.append(Speed(len(batch), len(batch) / p50, 1e3 * p20, 1e3 * p50, 1e3 * p80, seconds))
    return found
