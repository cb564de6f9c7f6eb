"""Compile or inspect many kernels in parallel, on all cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

from fastres.terminal import progress_bar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int | None, label: str, progress: bool = True
) -> list[Result]:
    """Apply ``function`` to each item in worker processes, and show progress.

    By default there is one worker per core; ``workers=1`` works in this process. Workers are forked from a server
    process without threads, because forking a process whose threads hold locks can hang.
    """
    bar = partial(progress_bar, total=len(items), desc=label, unit="kernel", disable=not progress)
    if workers == 1:
        return list(bar(map(function, items)))
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton.compiler"])
    with ProcessPoolExecutor(min(workers or os.cpu_count() or 1, len(items) or 1), context) as pool:
        return list(bar(pool.map(function, items)))
