"""Compile kernels that load through TMA for sm_90, without a GPU, and report their resources and problems."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastres.errors import KernelError
from fastres.kernels import conv_specialized, conv_tma, fused, gemm
from fastres.kernels.launch import next_power_of_2
from fastres.kernels.routing.cards import H100, Gpu
from fastres.kernels.routing.rules import ConvConfig, ConvShape
from fastres.kernels.routing.tables import Block
from fastres.kernels.tma import tile_boxes, tma_candidates, tma_fits
from fastres.text import dtype_name

from .ahead_of_time import Compilation, compile_for, descriptor_type
from .parallel import in_processes
from .pointer_kernels import Report, read
from .ptx import Ptx, read_ptx

ARCH = H100.arch


def _kernel(name: str) -> Any:
    if name == "conv_specialized":
        from fastres.kernels.conv_specialized_gluon import conv_specialized_kernel

        return conv_specialized_kernel
    return {"gemm": gemm.gemm_kernel, "conv_tma": conv_tma.conv_tma_kernel, "fused": fused.fused_kernel}[name]


@dataclass(frozen=True)
class TmaReport:
    """A :class:`Report` with the counts that matter for TMA kernels."""

    report: Report
    ptx: Ptx
    chained: int = 0  # products that should take an operand from registers: the previous product's result

    @property
    def problems(self) -> tuple[str, ...]:
        """The kernel's problems: those of its report, no wgmma, or operands through registers where not chained."""
        found = {
            "multiplies through registers": self.ptx.register_products != self.chained,
            "multiplies without wgmma": self.report.wgmma == 0,
        }
        return self.report.problems + tuple(name for name, is_so in found.items() if is_so)

    @property
    def good(self) -> bool:
        """True if the kernel has no problems."""
        return not self.problems


def compile_gemm(
    c: int, k: int, dtype: torch.dtype, config: ConvConfig, *, residual: bool, relu: bool, shortcut_channels: int = 0,
    out: torch.dtype | None = None, label: str = "gemm",
) -> Compilation:  # fmt: skip
    """Return the compilation that :func:`gemm.gemm_into` with ``c`` input and ``k`` output channels needs."""
    constants = gemm.gemm_constants(c, shortcut_channels, k, dtype, config, residual=residual, relu=relu)
    return _compilation(label, "gemm", tile_boxes(config), constants, "M", dtype, out or dtype, config)


def compile_conv_tma(
    shape: ConvShape, dtype: torch.dtype, config: ConvConfig, *, residual: bool, relu: bool, shortcut_channels: int = 0,
    shortcut_stride: int = 1, out: torch.dtype | None = None, label: str = "conv_tma",
) -> Compilation:  # fmt: skip
    """Return the compilation that a launch of :func:`conv_tma.conv_tma_into` needs."""
    constants = conv_tma.conv_tma_constants(
        shape,
        dtype,
        config,
        residual=residual,
        relu=relu,
        shortcut_channels=shortcut_channels,
        shortcut_stride=shortcut_stride,
    )
    boxes = conv_tma.conv_tma_boxes(config)
    return _compilation(label, "conv_tma", boxes, constants, "N", dtype, out or dtype, config)


def compile_conv_specialized(
    shape: ConvShape, dtype: torch.dtype, config: ConvConfig, *, residual: bool, relu: bool, label: str
) -> Compilation:
    """Return the compilation that a launch of :func:`conv_specialized.conv_specialized_into` needs."""
    constants = conv_specialized.conv_specialized_constants(shape, config, residual=residual, relu=relu)
    boxes = conv_specialized.conv_specialized_boxes(shape, config)
    return _compilation(label, "conv_specialized", boxes, constants, "tiles", dtype, dtype, config)


def compile_tma(
    shape: ConvShape, dtype: torch.dtype, config: ConvConfig, *, residual: bool, relu: bool, label: str = "",
    out: torch.dtype | None = None,
) -> Compilation:  # fmt: skip
    """Return the compilation of the TMA kernel that ``config`` names, for a convolution without a merged shortcut."""
    label = label or layer_label(shape, residual=residual)
    if config.kernel in gemm.KERNELS:
        return compile_gemm(shape.C, shape.K, dtype, config, residual=residual, relu=relu, out=out, label=label)
    if config.kernel in conv_specialized.KERNELS:
        if out not in (None, dtype):  # a launch would fail, although the compilation for ``dtype`` does not
            raise KernelError(f"{config.kernel} writes {dtype_name(dtype)}, not {dtype_name(out)}")
        return compile_conv_specialized(shape, dtype, config, residual=residual, relu=relu, label=label)
    return compile_conv_tma(shape, dtype, config, residual=residual, relu=relu, out=out, label=label)


def compile_fused(
    shape: ConvShape, k: int, dtype: torch.dtype, config: ConvConfig, *, shortcut_channels: int = 0,
    shortcut_stride: int = 1, next_channels: int = 0,
) -> Compilation:  # fmt: skip
    """Return the compilation that a launch of :func:`fused.fused_into` needs; ``shape`` is of its 3×3 convolution."""
    channels = {"shortcut_channels": shortcut_channels, "next_channels": next_channels}
    constants = fused.fused_constants(shape, k, dtype, config, shortcut_stride=shortcut_stride, **channels)
    boxes = fused.fused_boxes(shape, config, **channels)
    if not next_channels:
        constants["bias3_ptr"] = None
    parts = [str(shape.C), f"{shape.K} + {shortcut_channels}" if shortcut_channels else str(shape.K)]
    parts.append(str(k) if shortcut_channels else f"{k} +res")
    parts += [str(next_channels)] * bool(next_channels)
    label = f"{shape.R}×{shape.S}/{shape.stride} {'→'.join(parts)} {shape.P}²"
    return _compilation(label, "fused", boxes, constants, "N", dtype, dtype, config)


def compile_block(block: Block, config: ConvConfig) -> Compilation:
    """Return the compilation of the kernel that ``config`` names, for joined convolutions."""
    shape, dtype = block.shape, getattr(torch, block.dtype)
    if block.fused:
        return compile_fused(
            shape, block.channels, dtype, config, shortcut_channels=block.shortcut_channels,
            shortcut_stride=block.shortcut_stride, next_channels=block.next_channels,
        )  # fmt: skip
    u = block.shortcut_channels
    label = layer_label(shape, residual=False, shortcut_channels=u)
    if config.kernel in gemm.KERNELS:
        return compile_gemm(
            shape.C, shape.K, dtype, config, residual=False, relu=True, shortcut_channels=u, label=label
        )
    return compile_conv_tma(
        shape, dtype, config, residual=False, relu=True, shortcut_channels=u, shortcut_stride=block.shortcut_stride,
        label=label,
    )  # fmt: skip


def layer_label(shape: ConvShape, *, residual: bool, shortcut_channels: int = 0) -> str:
    """Return a label such as ``3×3/2 128→128 28²``, with ``+ 256`` for a merged shortcut of 256 channels."""
    merged = f" + {shortcut_channels}" if shortcut_channels else ""
    size = f"{shape.P}²" if shape.P == shape.Q else f"{shape.P}×{shape.Q}"
    return f"{shape.R}×{shape.S}/{shape.stride} {shape.C}{merged}→{shape.K} {size}" + " +res" * residual


def _compilation(
    label: str, kernel: str, boxes: dict[str, list[int]], constants: dict[str, object], size: str, dtype: torch.dtype,
    out: torch.dtype, config: ConvConfig,
) -> Compilation:  # fmt: skip
    names = _kernel(kernel).arg_names
    # Arguments that a launch gives as None are constants of the compilation.
    unused = {name for name in names if name.endswith("_desc")} - boxes.keys()
    if constants.get("U") == 0:
        unused.add("u_desc")
    if not constants.get("HAS_RESIDUAL", not constants.get("U")):
        unused.add("residual_desc")
    constants |= dict.fromkeys(unused)
    types = {
        name: descriptor_type(out if name == "y_desc" else dtype, box)
        for name, box in boxes.items()
        if name not in unused
    }
    types |= {name: "*fp32" for name in names if name.endswith("_ptr") and name not in constants} | {size: "i32"}
    # Gluon takes the number of buffers as a constant.
    settings = (config.num_warps, None if kernel == "conv_specialized" else config.num_stages)
    return Compilation(label, kernel, tuple(types.items()), tuple(constants.items()), *settings)


def inspect_tma(item: Compilation, gpu: Gpu = H100) -> TmaReport:
    """Compile ``item`` for a Hopper ``gpu`` and read its resources from the machine code."""
    compiled = compile_for(item, _kernel(item.kernel), gpu.arch)
    constants = dict(item.constants)
    chained = 0
    if item.kernel == "fused":  # v and, for z, y go straight into the next product, which reduces over 16 at a time
        reduction = constants["J"] + (constants["BLOCK_N"] if constants["NEXT"] else 0)
        chained = reduction // 16 * constants["BLOCK_M"] // (16 * item.num_warps)
    return TmaReport(read(item, gpu, compiled), read_ptx(compiled.asm["ptx"]), chained)


def shown_configs(kernels: tuple[str, ...], k: int, *, residual: bool) -> list[ConvConfig]:
    """Return two configurations to show for ``k`` output channels: one tile per program, and the widest persistent.

    The first leaves room for a second program on a multiprocessor, which works while the first program stores.
    """
    widest = min(256, max(64, next_power_of_2(k)))
    found = []
    for kernel, width in zip(kernels, (min(128, widest), widest), strict=True):
        fitting = [
            config
            for config in tma_candidates((kernel,))
            if (config.block_m, config.block_n) == (128, width) and tma_fits(config, H100, residual=residual)
        ]
        found.append(fitting[0])
    return found


def inspect_tma_all(
    items: Iterable[Compilation], *, workers: int | None = None, progress: bool = True
) -> list[TmaReport]:
    """Compile ``items`` in parallel, with a progress bar."""
    return in_processes(inspect_tma, list(items), workers=workers, label=f"compile {ARCH}", progress=progress)


HEADER = (
    "layer", "kernel", "tile", "registers", "spills", "shared KiB", "wgmma", "via registers", "unguarded",
    "overwritten", "good",
)  # fmt: skip


def rows(items: Sequence[Compilation], reports: Sequence[TmaReport]) -> list[tuple[str, ...]]:
    """Return one row per kernel, under :data:`HEADER`."""
    found = []
    for item, tma in zip(items, reports, strict=True):
        sizes = dict(item.constants)
        kernel = item.kernel + "_persistent" * sizes.get("PERSISTENT", False)
        blocks = "×".join(str(sizes[f"BLOCK_{axis}"]) for axis in "MNK")
        tile = f"{blocks}, {item.num_warps} warps, {sizes.get('STAGES', item.num_stages)} stages"
        report = tma.report
        shared = f"{report.shared_memory / 1024:.1f}"
        used = (report.registers, report.spills, shared, report.wgmma)
        doubtful = (tma.ptx.register_products, report.unguarded, report.overwritten)
        found.append((report.label, kernel, tile, *map(str, (*used, *doubtful)), "yes" if tma.good else "NO"))
    return found
