"""Compile kernels without a GPU, exactly as a launch would.

A compilation does what a launch does before it needs the GPU: Triton binds the arguments, specialises on them and
compiles. A stand-in for the driver names the architecture to compile for. The result is the code that a launch with
these arguments runs. Triton caches it under the same key, so a later launch on such a GPU finds it.
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
    "i8": torch.int8, "fp8e4nv": torch.float8_e4m3fn,
}  # fmt: skip
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Compilation:
    """A kernel with everything its compilation depends on, except the target.

    ``types`` are those of the arguments known only at run time: ``"*fp16"`` for a tensor, ``"i32"`` for a size,
    ``"fp32"`` for a factor, and ``"fp16[64, 128]"`` for a descriptor that moves such boxes. ``num_stages`` is None if a
    launch gives none.
    """

    label: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int | None
    uses_dot: bool = True


def descriptor_type(dtype: torch.dtype, box: list[int]) -> str:
    """Return the type of a descriptor argument in a :class:`Compilation`."""
    return f"{TYPE_NAMES[dtype]}{box}"


def compile_for(item: Compilation, kernel: Any, arch: str) -> Any:
    """Compile ``kernel``, which ``item`` names, for ``arch``. Raise ``KernelError`` if ``arch`` is unknown."""
    constants = dict(item.constants)
    arguments = {name: _example(kind, kernel.is_gluon()) for name, kind in item.types} | constants
    options: dict[str, int | bool] = {"num_warps": item.num_warps}
    if item.num_stages is not None:
        options["num_stages"] = item.num_stages
    if constants.get("EARLY"):  # as inside launch.early_launches
        options["launch_pdl"] = True
    with as_if_on(arch):
        return kernel.run(**arguments, **options, grid=(1,), warmup=True)


def _example(kind: str, gluon: bool) -> Any:
    """Return an argument of a type. Triton does not specialise on its values."""
    if kind in ("i32", "fp32"):
        return 7 if kind == "i32" else 0.5
    if kind.startswith("*"):
        return torch.empty(8, dtype=DTYPES[kind[1:]], device="cpu")
    name, sizes = re.fullmatch(r"(\w+)\[(.+)\]", kind).groups()  # type: ignore[union-attr]
    box = [int(size) for size in sizes.split(",")]
    tensor = torch.empty(box, dtype=DTYPES[name], device="cpu")
    if gluon:
        from fastres.kernels.conv_specialized_gluon import describe

        return describe(tensor, box)
    return TensorDescriptor.from_tensor(tensor, box)


class _Driver:
    """The part of a driver that a launch uses before it runs anything."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return self.arch  # kernels cache compiled code by device: this is not a real device's number

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return target(self.arch)


def target(arch: str) -> GPUTarget:
    """Return Triton's target for a GPU of ``arch``. Raise ``KernelError`` if ``arch`` is unknown."""
    if re.fullmatch(r"sm_(7[5-9]|[89]\d|1\d\d)", arch):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", arch):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise KernelError(
        f"There is no GPU architecture {arch!r}; give an NVIDIA architecture, sm_75 or later (sm_80, sm_90, sm_120, …) "
        "or an AMD architecture (gfx90a, gfx942, …)"
    )


@contextmanager
def as_if_on(arch: str) -> Iterator[None]:
    """Make Triton treat a GPU of ``arch`` as the current one."""
    target(arch)
    before = driver._active  # the public accessor would look for a GPU
    driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        driver._active = before
