"""Text for the values of a run, shared by the terminal output, the charts and the report."""

from __future__ import annotations

from typing import Any


def device_name(environment: dict[str, Any]) -> str:
    """Return the name of the GPU, or of the CPU with its number of threads."""
    if environment["gpu"]:
        return str(environment["gpu"])
    threads = environment.get("threads")
    return f"{cpu_words(environment)}, {threads} thread{'s' if threads != 1 else ''}"


def cpu_words(environment: dict[str, Any]) -> str:
    """Return the CPU's name, its instruction sets and the limits on them. Older records have only the name."""
    known = (environment.get("cpu_instruction_sets"), environment.get("cpu_limits"))
    said = "; ".join(filter(None, known))
    return f"{environment['cpu']} ({said})" if said else str(environment["cpu"])


def todays_command(recorded: str) -> str:
    """Return a recorded command with current module names: older records say ``fastres.bench.run``."""
    return recorded.replace("-m fastres.bench.", "-m bench.")


def milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def speed(value: float | None) -> str:
    """Return a speed in images per second as text."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
