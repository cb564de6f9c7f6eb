"""Figures of a run in words, the same on screen, in charts and in the report."""

from __future__ import annotations

from typing import Any


def device_name(environment: dict[str, Any]) -> str:
    """The GPU, or the CPU and its threads."""
    if environment["gpu"]:
        return str(environment["gpu"])
    threads = environment.get("threads")
    return f"{cpu_words(environment)}, {threads} thread{'s' if threads != 1 else ''}"


def cpu_words(environment: dict[str, Any]) -> str:
    """The processor with its instruction sets, and what kept programs from some; older records have the name alone."""
    known = (environment.get("cpu_instruction_sets"), environment.get("cpu_limits"))
    said = "; ".join(filter(None, known))
    return f"{environment['cpu']} ({said})" if said else str(environment["cpu"])


def todays_command(recorded: str) -> str:
    """A recorded command by its module's name of today: records of before have ``fastres.bench.run``."""
    return recorded.replace("-m fastres.bench.", "-m bench.")


def milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def speed(value: float | None) -> str:
    """Images a second."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
