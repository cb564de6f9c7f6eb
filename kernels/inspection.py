"""Compile kernels with no GPU and report what the compiler made of them.

``python -m fastres.kernels.inspection`` compiles every kernel that a model would launch, for NVIDIA sm_80 and sm_90 and
AMD gfx942, and prints registers, spills, shared memory and matrix instructions. Resources are facts of the compiled
code; nothing is run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton

from fastres.text import text_table

from .ahead_of_time import TYPE_NAMES, Compilation, compile_for
from .cards import KNOWN_GPUS, Gpu
from .conv import conv_constants, conv_kernel
from .head import average_pool_kernel
from .parallel import in_processes
from .pool import window_pool_constants, window_pool_kernel
from .prepare import BLOCK_W, prepare_kernel
from .routing import (
    ConvConfig,
    ConvShape,
    PoolConfig,
    StemConfig,
    route_conv,
    route_pool,
    route_stem,
    route_window_pool,
)
from .squeeze_excite import gate_constants, gate_kernel
from .stem import pack_stem_weight, stem_constants, stem_kernel

if TYPE_CHECKING:
    from fastres.plan import Plan


@dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel. Counts are of instructions in the machine code."""

    label: str
    arch: str
    registers: int
    spills: int  # loads and stores of spilled registers in the whole kernel
    loop_spills: int  # of these, inside loops that hold matrix instructions
    shared_memory: int  # bytes
    wgmma: int
    mma: int  # matrix instructions of any kind

    @property
    def fits(self) -> bool:
        return self.shared_memory <= KNOWN_GPUS[self.arch].shared_memory


# Instructions that multiply: Hopper's warp-group products, the older warp-wide ones, and plain float32.
PRODUCTS = ("HGMMA", "QGMMA", "HMMA", "IMMA", "FFMA")

_KERNELS = {
    "conv": conv_kernel,
    "stem": stem_kernel,
    "prepare": prepare_kernel,
    "average_pool": average_pool_kernel,
    "window_pool": window_pool_kernel,
    "gate": gate_kernel,
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
    """The compilation that a launch of the convolution needs."""
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
    return _compilation(label, "conv", types, constants, config.num_warps, config.num_stages)


def compile_stem(
    weight_shape: tuple[int, ...], dtype: torch.dtype, input_dtype: torch.dtype, config: StemConfig, *, stride: int,
    padding: int, pool: bool,
) -> Compilation:  # fmt: skip
    """The compilation that a launch of the stem with an unpacked weight of ``weight_shape`` needs.

    For contiguous images [N, 3, H, W], as for :func:`compile_prepare`: a stride of 1 is a constant to the compiler.
    """
    weight = pack_stem_weight(torch.empty(weight_shape, dtype=dtype))
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
    return _compilation(label, "stem", types, constants, config.num_warps, config.num_stages)


def compile_prepare(dtype: torch.dtype, input_dtype: torch.dtype, *, padding: int) -> Compilation:
    """The compilation that preparing images for the stem needs."""
    constants = {"stride_w": 1, "PADDING": padding, "NORMALISE": input_dtype == torch.uint8, "BLOCK_W": BLOCK_W}
    types = {"x_ptr": f"*{TYPE_NAMES[input_dtype]}", "y_ptr": f"*{TYPE_NAMES[dtype]}"}
    types |= dict.fromkeys(("scale_ptr", "shift_ptr"), "*fp32")
    types |= dict.fromkeys(("H", "W", "HP", "WP", "stride_n", "stride_c", "stride_h", "stride_w"), "i32")
    return _compilation(f"prepare {TYPE_NAMES[input_dtype]} images", "prepare", types, constants, 4, None, False)


def compile_pool(channels: int, dtype: torch.dtype, config: PoolConfig) -> Compilation:
    """The compilation that a launch of the average pool needs."""
    constants = {"C": channels, "BLOCK_HW": config.block_hw, "BLOCK_C": config.block_c}
    types = {"x_ptr": f"*{TYPE_NAMES[dtype]}", "y_ptr": f"*{TYPE_NAMES[dtype]}", "HW": "i32"}
    return _compilation(f"average pool {channels}", "average_pool", types, constants, config.num_warps, None, False)


def compile_window_pool(channels: int, mode: str, dtype: torch.dtype, config: PoolConfig) -> Compilation:
    """The compilation that a launch of a window pool needs."""
    types = {"x_ptr": f"*{TYPE_NAMES[dtype]}", "y_ptr": f"*{TYPE_NAMES[dtype]}"}
    types |= dict.fromkeys(("H", "W", "P", "Q", "pixel_blocks"), "i32")
    constants = window_pool_constants(channels, mode, config)
    label = f"{mode} pool {'3×3' if mode == 'max' else '2×2'} {channels}"
    return _compilation(label, "window_pool", types, constants, config.num_warps, None, False)


def compile_squeeze_excite(
    squeezed: int, shape: tuple[int, ...], dtype: torch.dtype, route: Callable[[ConvShape], ConvConfig]
) -> list[Compilation]:
    """The compilations that squeeze-and-excitation to ``squeezed`` channels of ``shape`` (NHWC) needs."""
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
        _compilation(f"gate {c}", "gate", types, gate_constants(c, gate), gate.num_warps, None, False),
    ]


def _compilation(
    label: str,
    kernel: str,
    types: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int | None,
    uses_dot: bool = True,
) -> Compilation:
    constants = {**constants, "EARLY": False}
    known = tuple((name, kind) for name, kind in types.items() if name not in constants)
    return Compilation(label, kernel, known, tuple(constants.items()), num_warps, num_stages, uses_dot)


def plan_compilations(
    plan: Plan, gpu: Gpu, *, batch: int, height: int = 224, width: int = 224, dtype: torch.dtype = torch.float16
) -> list[Compilation]:
    """Every distinct compilation that running ``plan`` on ``gpu`` would need for this input, in plan order."""
    from fastres.gpu import conv_shape
    from fastres.plan import Conv, Head, Pool, SqueezeExcite, Stem

    shapes = plan.shapes(batch, height, width)
    found: dict[tuple[Any, ...], Compilation] = {}
    for step in plan:
        shape = shapes[step.input]
        made: list[Compilation] = []
        if isinstance(step, Stem):
            config = route_stem(step.weight.shape[0], step.conv_shape(shape)[:3], dtype, gpu, step.pool)
            size = tuple(step.weight.shape)
            made = [
                compile_stem(size, dtype, source, config, stride=step.stride, padding=step.padding, pool=step.pool)
                for source in (dtype, torch.uint8)
            ]
            if config.prepared:
                made += [compile_prepare(dtype, source, padding=step.padding) for source in (dtype, torch.uint8)]
        elif isinstance(step, Conv):
            sizes = conv_shape(step, shape)
            routed = route_conv(sizes, dtype, gpu)
            label = f"{sizes.R}×{sizes.S}/{sizes.stride} {sizes.C}→{sizes.K}"
            label += f" g{sizes.groups}" * (sizes.groups > 1) + " +res" * bool(step.residual)
            made = [compile_conv(sizes, dtype, routed, residual=step.residual is not None, relu=step.relu, label=label)]
        elif isinstance(step, Pool):
            made = [compile_window_pool(shape[3], step.mode, dtype, route_window_pool(shape[3]))]
        elif isinstance(step, SqueezeExcite):
            made = compile_squeeze_excite(step.weight.shape[0], shape, dtype, lambda s: route_conv(s, dtype, gpu))
        elif isinstance(step, Head):
            classes, channels = step.weight.shape
            made = [compile_pool(channels, dtype, route_pool(channels, shape[1] * shape[2]))]
            linear = ConvShape(batch, 1, 1, channels, classes, 1, 1, 1, 0)
            routed = route_conv(linear, dtype, gpu)
            label = f"linear {channels}→{classes}"
            made.append(compile_conv(linear, dtype, routed, residual=False, relu=False, out=torch.float32, label=label))
        for item in made:
            found.setdefault((item.kernel, item.types, item.constants, item.num_warps, item.num_stages), item)
    return list(found.values())


def inspect(item: Compilation, arch: str) -> Report:
    """Compile ``item`` for ``arch`` (``"sm_90"``, ``"gfx942"``) and read its resources off the machine code."""
    compiled = compile_for(item, _KERNELS[item.kernel], arch)
    read = _read_amd if arch.startswith("gfx") else _read_nvidia
    return read(item.label, arch, compiled)


def _read_nvidia(label: str, arch: str, compiled: Any) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(compiled.asm["cubin"])
    try:
        usage = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    finally:
        os.unlink(file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    code = list(_instructions(sass))
    loops = [(target, address) for address, _, target in code if target is not None and target < address]
    spills = [address for address, opcode, _ in code if opcode in ("STL", "LDL")]
    products = [(address, opcode) for address, opcode, _ in code if opcode in PRODUCTS]
    hot = [(low, high) for low, high in loops if any(low <= address <= high for address, _ in products)]
    return Report(
        label,
        arch,
        int(registers.group(1)),
        len(spills),
        sum(any(low <= address <= high for low, high in hot) for address in spills),
        compiled.metadata.shared,
        sum(opcode == "HGMMA" for _, opcode in products),
        sum(opcode != "FFMA" for _, opcode in products),
    )


def _instructions(sass: str) -> Iterator[tuple[int, str, int | None]]:
    """Address, opcode without modifiers, and branch target of each instruction."""
    for match in re.finditer(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)([^;]*);", sass):
        address, opcode, rest = int(match.group(1), 16), match.group(2), match.group(3)
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode == "BRA" else None
        yield address, opcode, int(target.group(1), 16) if target else None


def _cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def _read_amd(label: str, arch: str, compiled: Any) -> Report:
    code = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", code)
        return int(match.group(1)) if match else 0

    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    products = len(re.findall(r"\bv_mfma", code))
    return Report(label, arch, number("vgpr_count"), spills, spills, compiled.metadata.shared, 0, products)


def inspect_all(
    items: Iterable[Compilation], arch: str, *, workers: int | None = None, progress: bool = True
) -> list[Report]:
    """Compile ``items`` in parallel, with a progress bar."""
    run = partial(inspect, arch=arch)
    return in_processes(run, list(items), workers=workers, label=f"compile {arch}", progress=progress)


def table(reports: Sequence[Report]) -> str:
    """The reports as text, one row per kernel."""
    rows: list[tuple[str, ...]] = [("kernel", "arch", "registers", "spills", "in loop", "shared KiB", "wgmma", "mma")]
    for r in reports:
        shared = f"{r.shared_memory / 1024:.1f}" + ("" if r.fits else " too much")
        numbers = (r.registers, r.spills, r.loop_spills, shared, r.wgmma, r.mma)
        rows.append((r.label, r.arch, *map(str, numbers)))
    return text_table(rows, right=range(2, 8))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; exit status 1 where a kernel does not fit or spills in its main loop."""
    from fastres.architectures import get_architecture
    from fastres.folding import outline

    parser = argparse.ArgumentParser(prog="python -m fastres.kernels.inspection", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--arch", nargs="+", choices=list(KNOWN_GPUS), default=list(KNOWN_GPUS))
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    plan = outline(get_architecture(options.model), dtype)
    reports: list[Report] = []
    for arch in options.arch:
        items: dict[Compilation, None] = {}
        for batch in options.batch:
            size = options.size
            made = plan_compilations(plan, KNOWN_GPUS[arch], batch=batch, height=size, width=size, dtype=dtype)
            items |= dict.fromkeys(made)
        reports += inspect_all(items, arch)
    print(table(reports))
    bad = [report for report in reports if not report.fits or report.loop_spills]
    print(f"{len(reports)} kernels, Triton {triton.__version__}; {len(bad)} too large or spilling in the main loop")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
