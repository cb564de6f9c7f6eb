"""Compiling kernels with no GPU, exactly as a launch would.

A compilation is a launch up to where the driver would be asked: Triton binds the arguments, specialises on them and
compiles for the GPU that stands in for the real one. So the result is what a launch of these arguments runs, and it
lies in Triton's cache under the same key: a launch on such a GPU later finds it there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.errors import KernelError

DTYPES = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "u8": torch.uint8, "i32": torch.int32,
}  # fmt: skip
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Compilation:
    """A kernel with everything its compilation depends on, except the target.

    ``types`` are of the arguments known at run time only: ``"*fp16"`` for a tensor, ``"i32"`` for a size, and
    ``"fp16[64, 128]"`` for a descriptor that moves such boxes. ``num_stages`` is None where a launch gives none.
    """

    label: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int | None
    uses_dot: bool = True


def descriptor_type(dtype: torch.dtype, box: list[int]) -> str:
    """The type of a descriptor argument in a :class:`Compilation`."""
    return f"{TYPE_NAMES[dtype]}{box}"


def compile_for(item: Compilation, kernel: Any, arch: str) -> Any:
    """``kernel``, which ``item`` names, compiled for ``arch``; raises ``KernelError`` where that is no architecture."""
    constants = dict(item.constants)
    arguments = {name: _example(kind, kernel.is_gluon()) for name, kind in item.types} | constants
    options: dict[str, int | bool] = {"num_warps": item.num_warps}
    if item.num_stages is not None:
        options["num_stages"] = item.num_stages
    if constants.get("EARLY"):  # as within launch.early_launches
        options["launch_pdl"] = True
    with as_if_on(arch):
        return kernel.run(**arguments, **options, grid=(1,), warmup=True)


def _example(kind: str, gluon: bool) -> Any:
    """An argument of a type; numbers are such that nothing about them is special."""
    if kind == "i32":
        return 7
    if kind.startswith("*"):
        return torch.empty(8, dtype=DTYPES[kind[1:]])
    name, sizes = re.fullmatch(r"(\w+)\[(.+)\]", kind).groups()  # type: ignore[union-attr]
    box = [int(size) for size in sizes.split(",")]
    tensor = torch.empty(box, dtype=DTYPES[name])
    if gluon:
        from fastres.kernels.conv_specialized_gluon import describe

        return describe(tensor, box)
    return TensorDescriptor.from_tensor(tensor, box)


class _Driver:
    """As much of a driver as a launch asks before there is something to run."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return self.arch  # kernels remember what they compiled by device: this one is no real device's number

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return target(self.arch)


def target(arch: str) -> GPUTarget:
    """What Triton compiles for on a GPU of ``arch``; raises ``KernelError`` where that is no architecture."""
    if re.fullmatch(r"sm_(7[5-9]|[89]\d|1\d\d)", arch):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", arch):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise KernelError(
        f"No GPU has the architecture {arch!r}; accepted: NVIDIA's from sm_75 on (sm_80, sm_90, sm_120, …) and AMD's "
        "(gfx90a, gfx942, …)"
    )


@contextmanager
def as_if_on(arch: str) -> Iterator[None]:
    """Make Triton take a GPU of ``arch`` for the current one."""
    target(arch)
    before = driver._active  # asking for it in public would look for a GPU
    driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        driver._active = before
