"""The share of the processor that a container may use, and the number of threads that suits it.

A container with half a core still sees all cores, and torch starts a thread for each. When they have used up the
container's time, all of them stop until the next period, usually of 100 ms, so that every call takes long.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastres.errors import ThreadsWarning
from fastres.terminal import warn

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Variables by which users choose the number of threads themselves.
CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")

_warned = False


def cores_allowed() -> float | None:
    """Return how many cores' time this process may use, such as 0.5, or ``None`` if there is no limit.

    Reads the limits of Linux's control groups, of both versions. A limit of an outer group holds for inner ones.
    """
    limits = [limit for folder in _folders() if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def suitable_threads() -> int:
    """Return the number of threads for this process: one for each core whose time it may use, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = cores_allowed()
    return cores if allowed is None else max(1, min(cores, round(allowed)))


def limit_threads() -> None:
    """Set the number of torch's threads for a program of fastres's own, if the user has not chosen it."""
    if not any(os.environ.get(name) for name in CHOSEN) and torch.get_num_threads() > suitable_threads():
        torch.set_num_threads(suitable_threads())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Make torch use ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def warn_of_too_many_threads() -> None:
    """Warn once if torch uses more threads than the container has cores."""
    global _warned
    allowed = None if _warned else cores_allowed()
    if allowed is not None and torch.get_num_threads() > max(1, round(allowed)):
        _warned = True
        warn(
            f"torch uses {torch.get_num_threads()} threads, but this container may use the time of {allowed:g} cores, "
            f"so threads wait for each other. Call torch.set_num_threads({suitable_threads()}), or set "
            f"OMP_NUM_THREADS={suitable_threads()}",
            ThreadsWarning,
        )


def _folders() -> list[Path]:
    """Return the folders of the control groups that limit this process, from the innermost to the outermost."""
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in (CGROUPS / controllers, CGROUPS / "cpu") if controllers else (CGROUPS, CGROUPS / "unified"):
            inner = root / name.lstrip("/")
            # Inside a container, the group's name is often that of the host, and its files are at the root.
            found += [folder for folder in (inner, *inner.parents) if folder == root or root in folder.parents]
    return list(dict.fromkeys(found))


def _limit(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, _, period = (folder / "cpu.max").read_text(encoding="utf-8").partition(" ")
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period")
            )
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):  # ValueError: the quota is "max"
        return None
