"""A run as one self-contained HTML file without scripts, external fonts or external images.

The template ``report.html.jinja`` holds the text. This module computes the values only from
:class:`fastres.bench.report.results.Results`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .charts import BOUND_COLOURS, layer_settings
from .results import OK, LayerRow, Results, Row
from .standing import FASTRES, compared, fastest, groups, points, roofline_speed, verdict
from .words import device_name, milliseconds, speed

TEMPLATE = "report.html.jinja"
FACTS = {
    "gpu": "GPU", "gpu_memory_gb": "GPU memory, GB", "cpu": "CPU",
    "cpu_instruction_sets": "CPU instruction sets", "cpu_limits": "CPU limited by",
    "cpu_count": "CPU cores", "threads": "threads", "memory_kept": "freed memory is kept", "huge_pages": "huge pages",
    "onednn": "oneDNN",
    "load_average": "load average before the run",
    "system": "system", "python": "Python", "torch": "torch", "cuda": "CUDA",
    "hip": "HIP", "cudnn": "cuDNN", "triton": "Triton", "fastres": "fastres", "commit": "commit",
    "without": "FASTRES_WITHOUT", "date": "date", "command": "command",
    "weights": "weights", "tf32": "TF32 for float32", "first_call": "first call", "timing": "clock",
    "peak_memory": "peak memory",
}  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """The steps of one setting and the values for their bars; ``longest`` is the longest step's time."""

    title: str
    rows: Sequence[LayerRow]
    us: float
    roofline_us: float
    longest: float


def render(results: Results, charts: Mapping[str, bytes | None]) -> str:
    """Return the report as HTML text. ``charts`` are PNG files by name, or ``None`` if the run has no such chart."""
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(ms=milliseconds, speed=speed, percent=_percent, significant=_significant)
    said, lost = verdict(results.rows)
    return environment.get_template(TEMPLATE).render(
        device=device_name(results.environment),
        environment=results.environment,
        facts=_facts(results.environment),
        runs=results.environment.get("runs", [results.environment]),
        complete=results.environment.get("complete", True),
        verdict=said,
        lost=lost,
        points=points(results.rows),
        headlines=[_headline(key, batches) for key, batches in groups(results.rows) if any(map(compared, batches))],
        groups=[(key, [(rows, fastest(rows)) for rows in batches]) for key, batches in groups(results.rows)],
        absences=_absences(results.rows),
        left_out=results.environment.get("left_out", []),
        older=older(results),
        layers=[_steps(rows) for rows in layer_settings(results.layers).values()],
        charts={name: base64.b64encode(png).decode() for name, png in charts.items() if png is not None},
        colours=BOUND_COLOURS,
        ok=OK,
        own=FASTRES,
    )


def older(results: Results) -> list[str]:
    """Return a sentence for each earlier commit at which rows were measured."""
    last = results.environment.get("commit", "")
    commits = dict.fromkeys(row.commit for row in results.rows if row.commit and row.commit != last)
    return [
        f"Measured earlier, at commit {commit}: "
        + ", ".join(
            f"{row.engine} at {row.model} {row.dtype} batch {row.batch}" for row in results.rows if row.commit == commit
        )
        for commit in commits
    ]


def _facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the names and values of the machine and its software for the report."""
    shown = {True: "yes", False: "no"}
    return [
        (words, shown[value] if isinstance(value, bool) else str(value))
        for name, words in FACTS.items()
        if (value := environment.get(name)) not in (None, "")
    ]


def _headline(key: tuple[str, int, str], batches: list[list[Row]]) -> dict[str, Any]:
    """Return images per second by batch and engine, without engines that were never timed."""
    timed = [row for rows in batches for row in rows if row.status == OK]
    engines = list(dict.fromkeys(row.engine for row in timed if row.engine != FASTRES))
    lines = []
    for rows in batches:
        cells = {row.engine: row for row in rows if row.status == OK}
        lines.append({"batch": rows[0].batch, "cells": cells, "best": fastest(rows), "roofline": roofline_speed(rows)})
    model, size, dtype = key
    return {"title": f"{model}, {dtype}, {size}×{size}", "engines": [FASTRES, *engines], "lines": lines}


def _absences(rows: Sequence[Row]) -> list[tuple[str, str, str, str]]:
    """Return engine, dtypes, status and reason of each engine that was not timed, without duplicates."""
    said: dict[tuple[str, str, str], dict[str, None]] = {}
    for row in rows:
        if row.status != OK:
            said.setdefault((row.engine, row.status, row.note), {})[row.dtype] = None
    return [(engine, ", ".join(dtypes), status, note) for (engine, status, note), dtypes in said.items()]


def _steps(rows: Sequence[LayerRow]) -> Steps:
    first = rows[0]
    return Steps(
        f"{first.model}, {first.dtype}, {first.size}×{first.size}, batch {first.batch}",
        rows,
        sum(row.us or 0.0 for row in rows),
        sum(row.roofline_us or 0.0 for row in rows),
        max([row.us or 0.0 for row in rows] + [1e-9]),
    )


def _percent(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def _significant(value: float | None, digits: int = 3) -> str:
    """Return ``value`` with ``digits`` significant digits, without an exponent if it is at least 1."""
    if value is None:
        return ""
    text = f"{value:.{digits}g}"
    return f"{value:,.0f}" if "e" in text and abs(value) >= 1 else text
