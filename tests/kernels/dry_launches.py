"""Launches without a GPU: everything up to the driver, with tensors of the CPU.

Triton binds a launch's arguments, specialises on them and compiles for sm_90 exactly as it would on a GPU; only the
launch itself is left out. So a wrong argument shows, and the code can be compared with what the ahead-of-time
inspection compiled.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastres.kernels import routing
from fastres.kernels.routing import H100


@dataclass(frozen=True)
class Launched:
    kernel: str
    grid: tuple[int, ...]
    code: str
    early: bool


def code(compiled: Any) -> str:
    """A compiled kernel's PTX without what tells where its source lies."""
    instructions: str = compiled.asm["ptx"].partition("\t.file")[0]
    return re.sub(r"^\s*\.loc.*\n|^\$L__tmp\d+:\n", "", instructions, flags=re.MULTILINE)


class _Driver:
    """As much of a driver as compiling takes. Kernels remember what they compiled by device: this one is no other's."""

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def dry_launches(patch: pytest.MonkeyPatch) -> Iterator[list[Launched]]:
    """Launches on CPU tensors are compiled for an H100 and listed."""
    launched: list[Launched] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **named: Any) -> Any:
        compiled = run(self, *arguments, grid=grid, warmup=True, **named)
        found = compiled.result() if hasattr(compiled, "result") else compiled
        launched.append(Launched(self.fn.__name__, tuple(grid), code(found), found.metadata.launch_pdl))
        return compiled

    known = routing.gpu_of
    with patch.context() as within:
        within.setattr(driver, "_active", _Driver())
        within.setattr(JITFunction, "run", compile_only)
        for name, module in list(sys.modules.items()):
            if name.startswith("fastres.") and getattr(module, "gpu_of", None) is known:
                within.setattr(module, "gpu_of", lambda _device: H100)
        yield launched
