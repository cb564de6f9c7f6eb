"""Launches without a GPU: everything up to the driver, with tensors of the CPU.

Triton binds a launch's arguments, specialises on them and compiles for sm_90 exactly as it would on a GPU; only the
launch itself is left out. So a wrong argument shows, and what it compiles can be compared with the ahead-of-time
inspection.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from triton.runtime.jit import JITFunction

from fastres.kernels.inspection.ahead_of_time import as_if_on
from fastres.kernels.routing import cards
from fastres.kernels.routing.cards import H100


@dataclass(frozen=True)
class Launched:
    """A launch that went as far as compiling; ``key`` is what Triton's cache knows the code by."""

    kernel: str
    key: str
    ptx: str
    early: bool


@contextmanager
def dry_launches(patch: pytest.MonkeyPatch) -> Iterator[list[Launched]]:
    """Launches on CPU tensors are compiled for an H100 and listed."""
    launched: list[Launched] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **named: Any) -> Any:
        compiled = run(self, *arguments, grid=grid, warmup=True, **named)
        launched.append(Launched(self.fn.__name__, compiled.hash, compiled.asm["ptx"], compiled.metadata.launch_pdl))
        return compiled

    known = cards.gpu_of
    with patch.context() as within, as_if_on(H100.arch):
        within.setattr(JITFunction, "run", compile_only)
        for name, module in list(sys.modules.items()):
            if name.startswith("fastres.") and getattr(module, "gpu_of", None) is known:
                within.setattr(module, "gpu_of", lambda _device: H100)
        yield launched
