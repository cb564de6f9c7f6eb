"""Shared by all kernels: the interpreter switch, device guards, op registration, argument checks.

From the rest of fastres, ``kernels`` may import only ``fastres.errors`` and ``fastres.text``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastres.errors import DeviceError, DtypeError, KernelError
from fastres.text import dtype_name

# TRITON_INTERPRET=1 runs kernels in Python on CPU tensors. Triton reads it when a kernel is defined.
INTERPRETED: bool = bool(knobs.runtime.interpret)

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INT32_ELEMENTS = 2**31


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` current: Triton launches on the current device and its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


_early: ContextVar[bool] = ContextVar("early", default=False)


@contextlib.contextmanager
def early_launches() -> Iterator[None]:
    """Start each kernel in this context while the previous one still runs (programmatic dependent launch).

    A kernel waits for all writes of its predecessor before it reads or writes anything, so only its start-up overlaps.
    Needs an NVIDIA GPU, sm_90 or newer. Kernels without the EARLY argument are launched as usual.
    """
    token = _early.set(True)
    try:
        yield
    finally:
        _early.reset(token)


def start_options() -> dict[str, bool]:
    """Return the launch options for the next kernel: its compile-time argument EARLY, and Triton's option for it."""
    return {"EARLY": True, "launch_pdl": True} if _early.get() else {"EARLY": False}


@triton.jit
def wait_for_inputs():
    """Let the next kernel start, then wait for the previous one. Comes first in a kernel that was launched early.

    The previous kernel has waited for its own predecessor, so all kernels before this one are then finished.
    """
    gdc_launch_dependents()
    gdc_wait()


def kernel_op(name: str, mutates_args: tuple[str, ...]) -> Callable[[Callable[..., Any]], Any]:
    """Register a host function as the torch op ``fastres::name``, which ``torch.compile`` can trace into."""
    return torch.library.triton_op(f"fastres::{name}", mutates_args=mutates_args)


def launchable(kernel: Any, traceable: bool) -> Any:
    """Return ``kernel``, wrapped so that ``torch.compile`` can trace it if it runs inside a registered op."""
    return torch.library.wrap_triton(kernel) if traceable and not INTERPRETED else kernel


def check_tensors(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Raise an error unless every tensor is contiguous and on ``device``, and kernels run on ``device``."""
    if device.type not in (("cpu", "cuda") if INTERPRETED else ("cuda",)):
        accepted = "CPU or CUDA tensors (TRITON_INTERPRET=1 is set)" if INTERPRETED else "CUDA tensors"
        raise DeviceError(f"{op} takes {accepted} and was given tensors on {device}")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise DeviceError(f"{op}: {name} is on {tensor.device}, the other tensors on {device}")
        if not tensor.is_contiguous():
            raise KernelError(
                f"{op}: {name} {list(tensor.shape)} has strides {tensor.stride()}; pass {name}.contiguous()"
            )


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise KernelError(f"{op}: {name} is {list(tensor.shape)} and must be {list(shape)}")


def check_dtype(op: str, name: str, tensor: Tensor, *accepted: torch.dtype) -> None:
    if tensor.dtype not in accepted:
        names = ", ".join(map(dtype_name, accepted))
        raise DtypeError(f"{op}: {name} is {dtype_name(tensor.dtype)} and must be {names}")


def needs_wide_offsets(*tensors: Tensor | None) -> bool:
    """Return True if the offset of some element does not fit 32 bits."""
    return any(tensor is not None and tensor.numel() >= INT32_ELEMENTS for tensor in tensors)


def dot_upcast(dtype: torch.dtype) -> bool:
    """Return True if a dot must multiply in float32: the interpreter's bfloat16 dot is wrong in Triton 3.6 to 3.9."""
    return INTERPRETED and dtype == torch.bfloat16


def float32_precision() -> str:
    """Return the precision of float32 dots: ``"tf32"`` if torch's own matrix products may use it, else ``"ieee"``.

    torch allows it after ``torch.set_float32_matmul_precision("high")`` or ``"medium"``, or if
    ``torch.backends.cuda.matmul.fp32_precision`` or ``torch.backends.fp32_precision`` is ``"tf32"``.
    """
    # The newer setting reflects the older one. The older one's getter raises if the newer one was set.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def next_power_of_2(value: int) -> int:
    return triton.next_power_of_2(value)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
