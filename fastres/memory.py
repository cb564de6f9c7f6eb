"""Huge pages for the tensors of a CPU.

A network writes tens of megabytes for each layer of a batch. Linux hands out memory in pages of 4 kB, each at its first
use, which takes a good part of the time. With transparent huge pages of 2 MB there are 512 times fewer. PyTorch asks
for them if an environment variable says so when it allocates the first tensor of the process.
"""

from __future__ import annotations

import os
from pathlib import Path

from .errors import DeviceError

VARIABLE = "THP_MEM_ALLOC_ENABLE"
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PROBE = 8 * 2**20  # bytes; PyTorch asks for huge pages from 2 MB on


def use_huge_pages() -> bool:
    """Have PyTorch use huge pages for large tensors on the CPU, in this process and those that it starts.

    Call this before the first tensor of the process is created, ``fastres.load`` included. fastres's own commands do it
    themselves, unless the environment variable ``THP_MEM_ALLOC_ENABLE`` is set. Models then run up to a fifth faster in
    float32. The process may take a few percent more memory.

    Returns whether huge pages are in use: False on systems that have none. Raises ``DeviceError`` if the system has
    them, but this call comes too late.

    >>> import fastres
    >>> fastres.use_huge_pages()
    True
    """
    if not offered():
        return False
    os.environ[VARIABLE] = "1"
    if not in_use():
        raise DeviceError(
            "torch has created a tensor already, and it decides about huge pages at the first one. Call "
            f"fastres.use_huge_pages() at the beginning of the program, or set {VARIABLE}=1 in its environment"
        )
    return True


def ask_for_huge_pages() -> None:
    """Set the variable for a program of fastres's own, unless the user has set it or the system has no huge pages."""
    if VARIABLE not in os.environ and offered():
        os.environ[VARIABLE] = "1"


def offered() -> bool:
    """Return True if this system gives huge pages to programs that ask for them."""
    return _setting() in ("always", "madvise")


def in_use() -> bool:
    """Return True if large tensors on the CPU get huge pages in this process.

    This creates a tensor. If it is the first one, it decides for the process.
    """
    if not offered():
        return False
    if _setting() == "always":
        return True
    import torch

    probe = torch.empty(_PROBE, dtype=torch.uint8, device="cpu")
    return "hg" in _flags(probe.data_ptr() + _PROBE // 2)


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
