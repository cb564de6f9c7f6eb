"""Compile kernels that load through pointers, without a GPU, and report their resources and problems."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton

from fastres.kernels.conv import conv_constants, conv_kernel
from fastres.kernels.conv_8bit import conv_8bit_kernel
from fastres.kernels.head import average_pool_kernel
from fastres.kernels.pool import window_pool_constants, window_pool_kernel
from fastres.kernels.prepare import BLOCK_W, prepare_kernel
from fastres.kernels.routing.cards import Gpu
from fastres.kernels.routing.rules import (
    STRIP,
    ConvConfig,
    ConvShape,
    PoolConfig,
    StemConfig,
    route_pool,
    route_window_pool,
)
from fastres.kernels.squeeze_excite import gate_constants, gate_kernel
from fastres.kernels.stem import pack_stem_weight, stem_constants, stem_kernel
from fastres.kernels.stem_8bit import prepare_8bit_kernel, stem_8bit_kernel
from fastres.kernels.stem_strip import stem_strip_constants, stem_strip_kernel
from fastres.text import text_table

from .ahead_of_time import TYPE_NAMES, Compilation, compile_for
from .parallel import in_processes
from .ptx import RECOMMENDED, leaves_out_fence, read_ptx
from .sass import read_cubin


@dataclass(frozen=True)
class Report:
    """The resources of a compiled kernel. Counts are of instructions in the machine code, unless the PTX is named."""

    label: str
    gpu: Gpu
    registers: int
    spills: int  # loads and stores of spilled registers in the whole kernel
    loop_spills: int  # of these, inside loops with matrix instructions
    shared_memory: int  # bytes
    wgmma: int
    mma: int  # matrix instructions of any kind
    multiplies: bool = False  # operands have 16 or 8 bits, so matrix instructions are expected
    unguarded: int = 0  # in the PTX: buffers refilled, or released for refilling, with no barrier since a read
    overwritten: int = 0  # instructions that write a register that a wgmma in flight still reads
    unfenced: int = 0  # in the PTX: wgmma with no proxy fence since copies that they may read

    @property
    def fits(self) -> bool:
        return self.shared_memory <= self.gpu.shared_memory

    @property
    def problems(self) -> tuple[str, ...]:
        """The kernel's problems. A missing fence is not one if this version of Triton is known to leave it out."""
        found = {
            "does not fit": not self.fits,
            "spills in its loop": self.loop_spills > 0,
            "multiplies without tensor cores": self.multiplies and self.gpu.has_tensor_cores and not self.mma,
            "refills a buffer with no barrier": self.unguarded > 0,
            "overwrites operands in flight": self.overwritten > 0,
            "reads copies with no fence": self.unfenced > 0 and not leaves_out_fence(triton.__version__),
        }
        return tuple(name for name, is_so in found.items() if is_so)


_KERNELS = {
    "conv": conv_kernel,
    "stem": stem_kernel,
    STRIP: stem_strip_kernel,
    "prepare": prepare_kernel,
    "average_pool": average_pool_kernel,
    "window_pool": window_pool_kernel,
    "gate": gate_kernel,
    "conv_8bit": conv_8bit_kernel,
    "stem_8bit": stem_8bit_kernel,
    "prepare_8bit": prepare_8bit_kernel,
}


def compile_conv(
    shape: ConvShape,
    dtype: torch.dtype,
    config: ConvConfig,
    *,
    residual: bool,
    relu: bool,
    out: torch.dtype | None = None,
    label: str = "conv",
) -> Compilation:
    """Return the compilation that a launch of the convolution needs."""
    constants = conv_constants(shape, dtype, config, residual=residual, relu=relu)
    if not residual:
        constants["residual_ptr"] = None
    if config.split == 1:
        constants |= {"partial_ptr": None, "arrived_ptr": None}
    act = f"*{TYPE_NAMES[dtype]}"
    types = {
        "x_ptr": act,
        "w_ptr": act,
        "bias_ptr": "*fp32",
        "residual_ptr": act,
        "y_ptr": f"*{TYPE_NAMES[out or dtype]}",
        "partial_ptr": "*fp32",
        "arrived_ptr": "*i32",
    } | dict.fromkeys(("M", "H", "W", "P", "Q"), "i32")
    return compilation(label, "conv", types, constants, config.num_warps, config.num_stages)


def compile_stem(
    weight_shape: tuple[int, ...], dtype: torch.dtype, input_dtype: torch.dtype, config: StemConfig, *, stride: int,
    padding: int, pool: bool,
) -> Compilation:  # fmt: skip
    """Return the compilation that a launch of the stem with an unpacked weight of ``weight_shape`` needs.

    It is for contiguous images [N, 3, H, W], as in :func:`compile_prepare`: the compiler treats a stride of 1 as a
    constant.
    """
    weight = pack_stem_weight(torch.empty(weight_shape, dtype=dtype, device="cpu"))
    if config.kernel == STRIP:
        act = f"*{TYPE_NAMES[dtype]}"
        types = {"x_ptr": act, "w_ptr": act, "bias_ptr": "*fp32", "y_ptr": act}
        numbers = ("rows", "HP", "P", "Q", "POOL_P", "POOL_Q", "row_blocks", "column_blocks", "stride_n", "stride_h")
        types |= dict.fromkeys(numbers, "i32")
        constants = stem_strip_constants(weight, config)
        return compilation("stem in strips", STRIP, types, constants, config.num_warps, config.num_stages)
    input_dtype = dtype if config.prepared else input_dtype
    constants = stem_constants(
        weight, config, stride=stride, padding=padding, pool=pool, normalise=input_dtype == torch.uint8
    )
    types = {"x_ptr": f"*{TYPE_NAMES[input_dtype]}", "w_ptr": f"*{TYPE_NAMES[dtype]}", "y_ptr": f"*{TYPE_NAMES[dtype]}"}
    types |= dict.fromkeys(("bias_ptr", "scale_ptr", "shift_ptr"), "*fp32")
    sizes = ("H", "W", "P", "Q", "POOL_P", "POOL_Q", "row_blocks", "column_blocks")
    types |= dict.fromkeys((*sizes, "stride_n", "stride_c", "stride_h", "stride_w"), "i32")
    if not config.prepared:
        constants["stride_w"] = 1
    label = "stem, prepared images" if config.prepared else f"stem {TYPE_NAMES[input_dtype]} input"
    return compilation(label, "stem", types, constants, config.num_warps, config.num_stages)


def compile_prepare(dtype: torch.dtype, input_dtype: torch.dtype, *, padding: int) -> Compilation:
    """Return the compilation that preparing images for the stem needs."""
    constants = {"stride_w": 1, "PADDING": padding, "NORMALISE": input_dtype == torch.uint8, "BLOCK_W": BLOCK_W}
    types = {"x_ptr": f"*{TYPE_NAMES[input_dtype]}", "y_ptr": f"*{TYPE_NAMES[dtype]}"}
    types |= dict.fromkeys(("scale_ptr", "shift_ptr"), "*fp32")
    types |= dict.fromkeys(("H", "W", "HP", "WP", "stride_n", "stride_c", "stride_h", "stride_w"), "i32")
    return compilation(f"prepare {TYPE_NAMES[input_dtype]} images", "prepare", types, constants, 4, None, False)


def compile_pool(channels: int, dtype: torch.dtype, config: PoolConfig) -> Compilation:
    """Return the compilation that a launch of the average pool needs."""
    constants = {"C": channels, "BLOCK_HW": config.block_hw, "BLOCK_C": config.block_c}
    types = {"x_ptr": f"*{TYPE_NAMES[dtype]}", "y_ptr": f"*{TYPE_NAMES[dtype]}", "HW": "i32"}
    return compilation(f"average pool {channels}", "average_pool", types, constants, config.num_warps, None, False)


def compile_window_pool(channels: int, mode: str, dtype: torch.dtype, config: PoolConfig) -> Compilation:
    """Return the compilation that a launch of a window pool needs."""
    types = {"x_ptr": f"*{TYPE_NAMES[dtype]}", "y_ptr": f"*{TYPE_NAMES[dtype]}"}
    types |= dict.fromkeys(("H", "W", "P", "Q", "pixel_blocks"), "i32")
    constants = window_pool_constants(channels, mode, config)
    label = f"{mode} pool {'3×3' if mode == 'max' else '2×2'} {channels}"
    return compilation(label, "window_pool", types, constants, config.num_warps, None, False)


def compile_squeeze_excite(
    squeezed: int, shape: tuple[int, ...], dtype: torch.dtype, route: Callable[[ConvShape], ConvConfig]
) -> list[Compilation]:
    """Return the compilations that squeeze-and-excitation to ``squeezed`` channels of ``shape`` (NHWC) needs."""
    n, h, w, c = shape
    gate = route_window_pool(c)
    types = dict.fromkeys(("x_ptr", "residual_ptr", "y_ptr"), f"*{TYPE_NAMES[dtype]}")
    types |= {"gate_ptr": "*fp32", "HW": "i32", "pixel_blocks": "i32"}
    squeeze, expand = (ConvShape(n, 1, 1, *sizes, 1, 1, 1, 0) for sizes in ((c, squeezed), (squeezed, c)))
    label, out = f"squeeze {c}→{squeezed}", torch.float32
    return [
        compile_pool(c, dtype, route_pool(c, h * w)),
        compile_conv(squeeze, dtype, route(squeeze), residual=False, relu=True, label=label),
        compile_conv(expand, dtype, route(expand), residual=False, relu=False, out=out, label=f"expand {squeezed}→{c}"),
        compilation(f"gate {c}", "gate", types, gate_constants(c, gate), gate.num_warps, None, False),
    ]


def compilation(
    label: str,
    kernel: str,
    types: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int | None,
    uses_dot: bool = True,
) -> Compilation:
    """Return the compilation of ``kernel``, a name in this module's table, as launched outside ``early_launches``."""
    constants = {**constants, "EARLY": False}
    known = tuple((name, kind) for name, kind in types.items() if name not in constants)
    return Compilation(label, kernel, known, tuple(constants.items()), num_warps, num_stages, uses_dot)


def inspect(item: Compilation, gpu: Gpu) -> Report:
    """Compile ``item`` for ``gpu`` and read its resources from the machine code."""
    return read(item, gpu, compile_for(item, _KERNELS[item.kernel], gpu.arch))


def read(item: Compilation, gpu: Gpu, compiled: Any) -> Report:
    """Return the resources of ``item`` as ``compiled`` for ``gpu``."""
    weights = [kind.split("[")[0] for name, kind in item.types if name[0] == "w"]
    multiplies = item.uses_dot and any(re.search("8|16", kind) for kind in weights)
    if gpu.is_amd:
        return _read_amd(item.label, gpu, compiled, multiplies)
    code, text = read_cubin(compiled.asm["cubin"]), read_ptx(compiled.asm["ptx"])
    return Report(
        item.label,
        gpu,
        code.registers,
        code.spills,
        code.loop_spills,
        compiled.metadata.shared,
        code.wgmma,
        code.mma,
        multiplies,
        text.unguarded if item.num_warps > 1 else 0,
        code.overwritten,
        text.unfenced,
    )


def _read_amd(label: str, gpu: Gpu, compiled: Any, multiplies: bool) -> Report:
    code = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", code)
        return int(match.group(1)) if match else 0

    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    products = len(re.findall(r"\bv_(s?mfma|wmma)", code))
    return Report(label, gpu, number("vgpr_count"), spills, spills, compiled.metadata.shared, 0, products, multiplies)


def inspect_all(
    items: Iterable[Compilation], gpu: Gpu, *, workers: int | None = None, progress: bool = True
) -> list[Report]:
    """Compile ``items`` in parallel, with a progress bar."""
    run = partial(inspect, gpu=gpu)
    return in_processes(run, list(items), workers=workers, label=f"compile {gpu.arch}", progress=progress)


def table(reports: Sequence[Report]) -> str:
    """Return the reports as text, one row per kernel."""
    header = ("kernel", "arch", "registers", "spills", "in loop", "shared KiB", "wgmma", "mma", "unguarded")
    rows: list[tuple[str, ...]] = [(*header, "overwritten", "unfenced", "verdict")]
    for r in reports:
        numbers: tuple[object, ...] = (r.registers, r.spills, r.loop_spills, f"{r.shared_memory / 1024:.1f}")
        numbers += (r.wgmma, r.mma, r.unguarded, r.overwritten, r.unfenced)
        rows.append((r.label, r.gpu.arch, *map(str, numbers), ", ".join(r.problems) or "good"))
    return text_table(rows, right=range(2, 11))


def fence_note(reports: Sequence[Report]) -> str:
    """Return a note on the fences that Triton leaves out; empty if none is missing."""
    unfenced = sum(report.unfenced > 0 for report in reports)
    if not unfenced or not leaves_out_fence(triton.__version__):
        return ""
    return (
        f"Triton {triton.__version__} leaves out the fence between cp.async and wgmma in {unfenced} kernels; "
        f"{RECOMMENDED} or newer is recommended"
    )
