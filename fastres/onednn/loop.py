"""A loop over primitives in machine code, because Python between two primitives takes longer than it seems to.

A convolution drives the interpreter out of the processor's caches, so the few lines of Python before the next one wait
for memory, above all on a machine whose neighbours use it too. ``python -m bench.calls`` measures what that takes. The
loop fills one cache line. It calls oneDNN's function for each row of a table, until one fails.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from ctypes import c_int, c_int64, c_size_t, c_void_p
from functools import lru_cache, partial
from typing import NamedTuple

from .library import Library


class Execution(NamedTuple):
    """One run of a primitive: the arguments of ``dnnl_primitive_execute``, the pointers as numbers."""

    primitive: int
    stream: int
    length: int
    arguments: int


# int loop(const Execution *next, const Execution *end, int (*execute)(...)), for x86-64's System V calling convention:
# it returns the first status that is not 0. Jumps count from the instruction after them.
_CODE = bytes.fromhex(
    "f3 0f 1e fa"       # endbr64
    "55"                # push rbp
    "48 89 e5"          # mov  rbp, rsp
    "53"                # push rbx
    "41 54"             # push r12
    "41 55"             # push r13
    "50"                # push rax ; a multiple of 16 bytes, as calls need
    "48 89 fb"          # mov  rbx, rdi ; the next execution
    "49 89 f4"          # mov  r12, rsi ; the end of the table
    "49 89 d5"          # mov  r13, rdx ; execute
    "31 c0"             # xor  eax, eax ; success, if the table is empty
    "4c 39 e3"          # cmp  rbx, r12 ; each execution:
    "74 1a"             # je   26 bytes on, the end
    "48 8b 3b"          # mov  rdi, [rbx]
    "48 8b 73 08"       # mov  rsi, [rbx + 8]
    "48 8b 53 10"       # mov  rdx, [rbx + 16]
    "48 8b 4b 18"       # mov  rcx, [rbx + 24]
    "48 83 c3 20"       # add  rbx, 32
    "41 ff d5"          # call r13
    "85 c0"             # test eax, eax
    "74 e1"             # jz   31 bytes back, each execution
    "5a"                # pop  rdx ; the end:
    "41 5d"             # pop  r13
    "41 5c"             # pop  r12
    "5b"                # pop  rbx
    "5d"                # pop  rbp
    "c3"                # ret
)  # fmt: skip

Loop = Callable[[int, int, int], int]


def loop_over(library: Library, executions: Sequence[Execution], machine_code: bool = True) -> Callable[[], int]:
    """Return a function that runs ``executions`` up to the first that fails, and returns its status: 0 is success.

    Without ``machine_code``, or where :func:`absent` says why there is none, Python calls each.
    """
    found = _loop() if machine_code else ""
    if isinstance(found, str):
        return partial(_one_by_one, library.execute, tuple(executions))
    table = (c_int64 * (4 * len(executions)))(*[number for execution in executions for number in execution])
    begin = ctypes.addressof(table)
    run = partial(found, begin, begin + ctypes.sizeof(table), library.address("primitive_execute"))
    run.table = table  # type: ignore[attr-defined]  # lives as long
    return run


def absent() -> str | None:
    """Return why there is no loop in machine code; ``None`` if there is one."""
    found = _loop()
    return found if isinstance(found, str) else None


def _one_by_one(execute: Callable[[int, int, int, int], int], executions: Sequence[Execution]) -> int:
    for primitive, stream, length, arguments in executions:
        status = execute(primitive, stream, length, arguments)
        if status:
            return status
    return 0


@lru_cache
def _loop() -> Loop | str:
    """Return the loop, or why the system does not let it run."""
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.write(_CODE)
        code = (ctypes.c_char * len(page)).from_buffer(page)  # keeps the page
        libc = ctypes.CDLL(None, use_errno=True)
        protect = libc.mprotect
        protect.argtypes = (c_void_p, c_size_t, c_int)
        if protect(ctypes.addressof(code), len(page), mmap.PROT_READ | mmap.PROT_EXEC):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except (OSError, ValueError, AttributeError) as error:
        return f"the system allows no code that is made at run time ({error})"
    loop = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p)(ctypes.addressof(code))
    loop.code = code  # type: ignore[attr-defined]
    return loop
