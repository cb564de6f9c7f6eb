"""The processor as the operating system describes it: its name and the instruction sets for convolutions."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

# The common name of each flag in Linux's /proc/cpuinfo (x86: "flags", Arm: "Features"), from the oldest to the newest.
INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "BF16",
    "avx512_fp16": "FP16",
    "amx_tile": "AMX",
    "asimd": "NEON",
    "asimdhp": "FP16",
    "sve": "SVE",
    "bf16": "BF16",
    "i8mm": "I8MM",
}

# Environment variables that keep PyTorch (ATEN) and oneDNN from using some of them.
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def processor() -> dict[str, str | None]:
    """Return the processor's name, its instruction sets, and the variables that limit them; ``None`` for unknown."""
    return {
        "cpu": cpu_name(),
        "cpu_instruction_sets": ", ".join(instruction_sets()) or None,
        "cpu_limits": ", ".join(f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name)) or None,
    }


def cpu_name() -> str:
    """Return the processor's name as the operating system gives it."""
    return _field("model name") or platform.processor() or platform.machine()


def instruction_sets() -> tuple[str, ...]:
    """Return the entries of :data:`INSTRUCTION_SETS` that the processor has; empty if they are unknown."""
    flags = (_field("flags") or _field("Features")).split()
    return tuple(dict.fromkeys(name for flag, name in INSTRUCTION_SETS.items() if flag in flags))


def has_amx() -> bool:
    """Return True if the processor multiplies whole tiles of matrices, and no environment variable limits oneDNN."""
    return "AMX" in instruction_sets() and not any(os.environ.get(name) for name in LIMITS[1:])


def has_bf16() -> bool:
    """Return True if the processor multiplies bfloat16 numbers, and no environment variable limits oneDNN."""
    return "BF16" in instruction_sets() and not any(os.environ.get(name) for name in LIMITS[1:])


def _field(name: str) -> str:
    """Return a field of the first core in /proc/cpuinfo, or an empty string if it is missing."""
    return _first_core(CPUINFO).get(name, "")


@lru_cache
def _first_core(cpuinfo: Path) -> dict[str, str]:
    try:
        core = cpuinfo.read_text(encoding="utf-8", errors="replace").strip().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in core.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
