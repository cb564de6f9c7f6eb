"""Launch kernels without a GPU: everything up to the driver, with CPU tensors.

Triton binds the arguments of a launch, specialises on them and compiles for sm_90 exactly as on a GPU. Only the launch
itself is left out. So wrong arguments raise errors, and the compiled code can be compared with the ahead-of-time
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
    """A launch that stopped after compiling. ``key`` is the key of the code in Triton's cache."""

    kernel: str
    key: str
    ptx: str
    early: bool


@contextmanager
def dry_launches(patch: pytest.MonkeyPatch) -> Iterator[list[Launched]]:
    """Compile launches on CPU tensors for an H100, and list them."""
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
