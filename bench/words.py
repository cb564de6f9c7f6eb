"""Figures of a run in words, the same on screen, in charts and in the report."""

from __future__ import annotations

from typing import Any


def device_name(environment: dict[str, Any]) -> str:
    """The GPU, or the CPU and its threads."""
    if environment["gpu"]:
        return str(environment["gpu"])
    threads = environment.get("threads")
    return f"{environment['cpu']}, {threads} thread{'s' if threads != 1 else ''}"


def milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def speed(value: float | None) -> str:
    """Images a second."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
