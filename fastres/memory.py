"""Keep freed memory for the tensors to come, and use huge pages: for programs that run networks on a CPU.

A network writes tens of megabytes for each layer of a batch. glibc's malloc returns such blocks to the system when they
are freed, and the next layer gets its memory page by page again. A process that keeps its memory saves that time. With
transparent huge pages of 2 MB, there are also 512 times fewer pages. PyTorch asks for these if an environment variable
says so when the process creates its first tensor.
"""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

VARIABLE = "THP_MEM_ALLOC_ENABLE"
# Variables by which users choose malloc's behaviour themselves.
CHOSEN = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")

# The parameters of mallopt(3), and PyTorch's least size of a tensor for huge pages.
_MXFAST, _TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = 1, -1, -3, -4
_HUGE = 2 * 2**20
_NEVER, _DEFAULT_MAPS, _LARGEST_THRESHOLD = -1, 65536, 32 * 2**20
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

_kept = False


def keep_memory() -> bool:
    """Have this process keep the memory that it frees, for the next tensors, and use huge pages.

    Models on a CPU then run faster, large batches in float32 most of all. The process keeps as much memory as it ever
    used. fastres's own commands do this themselves, unless an environment variable chooses malloc's behaviour; a
    library does not. Call it once, best before anything creates a tensor: from then on torch no longer looks at the
    setting for huge pages. Returns True if memory is kept. With another C library than glibc, it is not.

    >>> import fastres
    >>> fastres.keep_memory()
    True
    """
    global _kept
    if VARIABLE not in os.environ and _setting() == "madvise":
        os.environ[VARIABLE] = "1"
    # No block is mapped by itself, none goes back to the system, and small ones are not merged again and again.
    _kept = _mallopt({_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER, _MXFAST: 0})
    return _kept


def keep_memory_of_program() -> None:
    """Call :func:`keep_memory` for a program of fastres's own, unless the user has chosen malloc's behaviour."""
    if not any(os.environ.get(name) for name in CHOSEN):
        keep_memory()


def keep_little() -> None:
    """Return large blocks to the system again: for a process that reads images, one of which may be very large."""
    global _kept
    if _kept:
        _kept = False
        _mallopt({
            _MMAP_MAX: _DEFAULT_MAPS, _MMAP_THRESHOLD: _LARGEST_THRESHOLD, _TRIM_THRESHOLD: 2 * _LARGEST_THRESHOLD
        })  # fmt: skip


def settle() -> None:
    """Let Python's garbage collection leave out all objects that exist now: for a process that has started.

    Otherwise it goes through all modules now and then, for tens of milliseconds, in the middle of some answer.
    """
    gc.collect()
    gc.freeze()


def is_kept() -> bool:
    """Return True if this process keeps its memory because of :func:`keep_memory`."""
    return _kept


def has_huge_pages() -> bool:
    """Return True if large tensors on the CPU get huge pages in this process.

    This creates a tensor. If it is the first one, it decides for the process.
    """
    if _setting() != "madvise":
        return _setting() == "always"
    import torch

    probe = torch.empty(4 * _HUGE, dtype=torch.uint8, device="cpu")
    return "hg" in _flags(probe.data_ptr() + 2 * _HUGE)


def _mallopt(values: dict[int, int]) -> bool:
    """Set parameters of glibc's malloc. Return False if the process has another C library."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    results = [library.mallopt(parameter, value) for parameter, value in values.items()]
    return all(result == 1 for result in results)


def _setting() -> str:
    """Return the chosen one of the kernel's settings, which are written as ``always [madvise] never``."""
    try:
        text = _SETTING.read_text()
    except OSError:
        return "never"
    return text.partition("[")[2].partition("]")[0]


def _flags(address: int) -> list[str]:
    """Return the kernel's flags of the memory at ``address``."""
    inside = False
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            first = line.split(maxsplit=1)[0]
            if not first.endswith(":"):
                start, _, stop = first.partition("-")
                inside = int(start, 16) <= address < int(stop, 16)
            elif inside and first == "VmFlags:":
                return line.split()[1:]
    return []
