"""Leave out kernels that misbehave, or ways to use them: the environment variable ``FASTRES_WITHOUT``.

``FASTRES_WITHOUT=fused,split`` names families of kernels, single kernels or ways to use them (``WAYS``), with
commas between them.
"""

from __future__ import annotations

import functools
import os

from fastres.errors import KernelError

VARIABLE = "FASTRES_WITHOUT"

# Families of kernels, by module name. Only a tuned table chooses these kernels, except for stem_strip.
FAMILIES = {
    "gemm": ("gemm", "gemm_persistent"),
    "conv_tma": ("conv_tma", "conv_tma_persistent"),
    "conv_specialized": ("conv_specialized", "conv_specialized_compact"),
    "fused": ("fused",),
    "stem_strip": ("stem_strip",),
}
WAYS = {
    "split": "reductions split across programs",
    "merged": "shortcuts merged into a convolution",
    "early": "kernels that start while the previous one still runs",
    "graphs": "CUDA graphs",
    "blocks": "activations in blocks of channels on a CPU; without them, they are channels-last",
    "primitives": "oneDNN's primitives on a CPU; without them, torch's operators call it",
    "loop": "a loop in machine code over oneDNN's primitives on a CPU; without it, Python calls each",
    "tables": "tuned tables; without them, rules alone decide",
}


@functools.cache
def left_out() -> frozenset[str]:
    """Return the kernels and ways that are left out. Raise ``KernelError`` for an unknown name."""
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    single = {kernel: (kernel,) for kernels in FAMILIES.values() for kernel in kernels}
    known = {**single, **FAMILIES, **{way: (way,) for way in WAYS}}
    if unknown := [name for name in names if name not in known]:
        names = [*FAMILIES, *WAYS]
        raise KernelError(f"FASTRES_WITHOUT names {unknown[0]!r}; it can leave out {', '.join(names)} or one kernel")
    return frozenset(part for name in names for part in known[name])


def can_be_left_out(name: str) -> bool:
    """Return True if ``name`` has an alternative, so that ``FASTRES_WITHOUT`` can leave it out."""
    return name in FAMILIES or name in WAYS or any(name in kernels for kernels in FAMILIES.values())
