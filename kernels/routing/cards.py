"""The facts about GPUs that routing uses, for the GPU in use and for known cards.

Kernels can be compiled, and times estimated, for a known card without having one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fastres.errors import KernelError
from fastres.kernels.launch import INTERPRETED


@dataclass(frozen=True)
class Gpu:
    """The facts about a GPU that routing depends on. A size or rate of 0 is unknown."""

    name: str
    arch: str  # "sm_90", "gfx942", …
    multiprocessors: int
    shared_memory: int  # bytes a program may use
    l2_cache: int = 0  # bytes
    gb_per_s: float = 0.0  # of its memory, in 10⁹ bytes/s, as the data sheet states

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def has_tensor_cores(self) -> bool:
        """True if Triton multiplies 16-bit numbers on the GPU's matrix units. On Turing (sm_75), it no longer does."""
        return self.arch != "sm_75" and not self.arch.startswith("gfx10")


MIB = 1 << 20

# Names are torch's, except the first three. Multiprocessors, L2 caches and memory rates: NVIDIA's and AMD's data sheets
# and architecture papers. Shared memory per program: CUDA C++ Programming Guide, compute capabilities.
A100 = Gpu("A100", "sm_80", 108, 166_912, 40 * MIB, 1555.0)
H100 = Gpu("H100", "sm_90", 132, 232_448, 50 * MIB, 3350.0)
MI300X = Gpu("MI300X", "gfx942", 304, 65_536, 4 * MIB, 5300.0)
H200 = Gpu("NVIDIA H200", "sm_90", 132, 232_448, 60 * MIB, 4800.0)
T4 = Gpu("Tesla T4", "sm_75", 40, 65_536, 4 * MIB, 320.0)
RTX_3090 = Gpu("NVIDIA GeForce RTX 3090", "sm_86", 82, 101_376, 6 * MIB, 936.0)
A10G = Gpu("NVIDIA A10G", "sm_86", 80, 101_376, 6 * MIB, 600.0)
L4 = Gpu("NVIDIA L4", "sm_89", 58, 101_376, 48 * MIB, 300.0)
L40S = Gpu("NVIDIA L40S", "sm_89", 142, 101_376, 96 * MIB, 864.0)
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", "sm_89", 128, 101_376, 72 * MIB, 1008.0)
RTX_5090 = Gpu("NVIDIA GeForce RTX 5090", "sm_120", 170, 101_376, 96 * MIB, 1792.0)
CARDS = (A100, H100, H200, MI300X, T4, RTX_3090, A10G, L4, L40S, RTX_4090, RTX_5090)

# Triton's interpreter: no GPU. Each operation costs the same, whatever the size of its tile.
INTERPRETER = Gpu("Triton interpreter", "interpreter", 1, 1 << 40)
# The ahead-of-time inspection compiles for these by default, one card per architecture. sm_89 stands for all
# architectures whose programs have 99 KiB of shared memory.
KNOWN_GPUS = {gpu.arch: gpu for gpu in (A100, L4, H100, MI300X)}


def card(name: str) -> Gpu:
    """Return the card with this name, or the first with this architecture. Raise ``KernelError`` if there is none."""
    for gpu in CARDS:
        if name in (gpu.name, gpu.arch):
            return gpu
    architectures = ", ".join(dict.fromkeys(gpu.arch for gpu in CARDS))
    names = ", ".join(gpu.name for gpu in CARDS)
    raise KernelError(
        f"There is no card or architecture {name!r}; give an architecture ({architectures}) or a card ({names})"
    )


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Return the GPU at ``device``, or the interpreter for a CPU device."""
    if device.type != "cuda":
        assert INTERPRETED, device
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    l2_cache = int(getattr(properties, "L2_cache_size", 0))
    # kHz, two transfers per cycle; torch reports both since 2.9
    clock, width = (int(getattr(properties, name, 0)) for name in ("memory_clock_rate", "memory_bus_width"))
    sizes = (l2_cache, 2e3 * clock * width / 8 / 1e9)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return Gpu(properties.name, arch, properties.multi_processor_count, 65_536, *sizes)
    arch = f"sm_{properties.major}{properties.minor}"
    shared_memory: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Gpu(properties.name, arch, properties.multi_processor_count, shared_memory, *sizes)
