"""What the environment variable ``FASTRES_WITHOUT`` leaves out, should it misbehave: kernels, and ways to use them.

``FASTRES_WITHOUT=fused,split`` names families of kernels or single ones, or ways (``WAYS``), separated by commas.
"""

from __future__ import annotations

import functools
import os

from fastres.errors import KernelError

VARIABLE = "FASTRES_WITHOUT"

# Families, by their modules' names, with the kernels in them. Only a tuned table chooses these.
FAMILIES = {
    "gemm": ("gemm", "gemm_persistent"),
    "conv_tma": ("conv_tma", "conv_tma_persistent"),
    "conv_specialized": ("conv_specialized", "conv_specialized_compact"),
    "fused": ("fused",),
}
WAYS = {
    "split": "reductions that programs share",
    "merged": "shortcuts merged into a convolution",
    "early": "kernels that start while the one before still runs",
    "graphs": "CUDA graphs",
    "tables": "tuned tables: rules alone decide",
}


@functools.cache
def left_out() -> frozenset[str]:
    """Kernels and ways that are left out; raises ``KernelError`` for a name that is neither."""
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    single = {kernel: (kernel,) for kernels in FAMILIES.values() for kernel in kernels}
    known = {**single, **FAMILIES, **{way: (way,) for way in WAYS}}
    if unknown := [name for name in names if name not in known]:
        names = [*FAMILIES, *WAYS]
        raise KernelError(f"FASTRES_WITHOUT names {unknown[0]!r}; it can leave out {', '.join(names)} or one kernel")
    return frozenset(part for name in names for part in known[name])


def can_be_left_out(name: str) -> bool:
    """Whether there is something else for what ``name`` is."""
    return name in FAMILIES or name in WAYS or any(name in kernels for kernels in FAMILIES.values())
