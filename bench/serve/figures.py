"""Numbers from the outcomes of requests: latencies, rates, batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastres.bench.report.results import significant

from .generator import BROKEN, TIMED_OUT, Outcome

PERCENTILES = (50, 95, 99, 100)
LATE_MS = 20.0  # if one request in a hundred was sent later than this, the generator was too slow
OTHERS_CORES = 0.1  # if other programs use more cores than this, they disturb the server


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """Return ``p50``, ``p95``, ``p99`` and ``max`` of ``values``, each a value that occurred; ``None`` without any."""
    names = [f"p{number}" if number < 100 else "max" for number in PERCENTILES]
    if not values:
        return dict.fromkeys(names)
    found = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return {name: significant(float(value), 4) for name, value in zip(names, found, strict=True)}


def summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Return the numbers of one load. ``seconds`` is the time in which requests were to be sent.

    The statuses count every request exactly once. ``images_per_s`` counts answers with status 200 over the time from
    the first request to the last such answer, or over ``seconds`` if that is longer.
    """
    good = [each for each in outcomes if each.status == 200]
    lasted = max([seconds, *(each.done for each in good)])
    return {
        "requests": len(outcomes),
        "statuses": {str(status): count for status, count in Counter(each.status for each in outcomes).items()},
        "no_answer": sum(each.status in (BROKEN, TIMED_OUT) for each in outcomes),
        "seconds": significant(seconds),
        "offered_per_s": significant(len(outcomes) / seconds, 4),
        "images_per_s": significant(len(good) / lasted, 4),
        "latency_ms": percentiles([each.latency_ms for each in good]),
        "refused_latency_ms": percentiles([each.latency_ms for each in outcomes if each.status == 429]),
        "late_ms": percentiles([1000 * (each.sent - each.due) for each in outcomes]),
        "server_ms": _server_ms(good),
    }


def _server_ms(good: Sequence[Outcome]) -> dict[str, Any] | None:
    """Return what the server says about its times, and what a request takes beside decoding and the model."""
    told = [(each.latency_ms, each.milliseconds) for each in good if each.milliseconds]
    if not told:
        return None
    found = {name: percentiles([times[name] for _, times in told]) for name in ("decode", "queue", "model")}
    return {**found, "beside": percentiles([total - times["decode"] - times["model"] for total, times in told])}


def disagreements(outcomes: Iterable[Outcome], known: dict[int, int]) -> int:
    """Return how many answers name another best class than the first answer for that photograph, in ``known``."""
    return sum(each.best is not None and known.setdefault(each.photo, each.best) != each.best for each in outcomes)


def agreement(best: Mapping[str, Mapping[int, int]], reference: str) -> dict[str, float | None]:
    """Return the share of photographs for which each other server names the best class of ``reference``.

    ``best`` has the best class by server and photograph. Servers decode differently, so that some may differ.
    """
    wanted = best.get(reference, {})
    found: dict[str, float | None] = {}
    for name, classes in best.items():
        both = classes.keys() & wanted.keys()
        if name != reference and both:
            found[name] = significant(sum(classes[photo] == wanted[photo] for photo in both) / len(both), 4)
    return found


def between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any] | None:
    """Return the batches between two readings of the metrics; ``None`` if the server has none."""
    if not after:
        return None
    change = {name: after[name] - before.get(name, 0.0) for name in after}
    count = change.get("fastres_batch_images_count", 0)
    if not count:
        return None
    bounds = {}
    previous = 0.0
    for name, value in change.items():
        if name.startswith('fastres_batch_images_bucket{le="'):
            bounds[name.split('"')[1]] = value - previous
            previous = value
    return {
        "batches": int(count),
        "mean_batch": significant(change["fastres_batch_images_sum"] / count, 3),
        "batches_up_to": {bound: int(value) for bound, value in bounds.items() if value},
        "mean_ms": {
            name: significant(1000 * change[f"fastres_{name}_seconds_sum"] / number, 4)
            for name in ("decode", "queue", "model")
            if (number := change[f"fastres_{name}_seconds_count"])
        },
    }


def warnings(summary: Mapping[str, Any], others_cores: float | None = None) -> list[str]:
    """Return what makes the numbers of a load doubtful. ``others_cores`` is how many cores other programs used."""
    late = summary["late_ms"]["p99"]
    found = [f"one request in a hundred was sent {late:g} ms late or more"] if late and late > LATE_MS else []
    if others_cores and others_cores > OTHERS_CORES:
        found.append(f"other programs used {others_cores:.2g} cores")
    return found
