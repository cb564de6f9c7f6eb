"""Shared by the kernels for Hopper's tensor memory accelerator (TMA): tiles, shared memory, epilogue, checks.

TMA moves boxes between memory and shared memory. The host describes each tensor with a *tensor descriptor* (base,
sizes, strides, box) at every launch, and the hardware computes the addresses. Reads outside the tensor return zeros;
writes outside it do nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.errors import DtypeError, KernelError
from fastres.kernels.routing.cards import INTERPRETER, Gpu, gpu_of
from fastres.kernels.routing.rules import ConvConfig
from fastres.text import dtype_name

from .launch import check_dtype, check_shape, check_tensors, dot_upcast

TMA_DTYPES = (torch.float16, torch.bfloat16)

# TMA's strides are multiples of 16 bytes: 8 elements of 2 bytes.
TMA_CHANNELS = 8

# Bytes of shared memory of an sm_90 multiprocessor, and bytes that each resident program reserves on top of its own.
MULTIPROCESSOR_SHARED_MEMORY = 228 * 1024
RESERVED_SHARED_MEMORY = 1024

# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages). Compiled for sm_90 by Triton 3.6.0 and 3.7.1, none spills in either
# kernel, and all read both wgmma operands from shared memory. The comments give registers of the matrix product with a
# residual, one tile per program / persistent, compiled by 3.7.1. 256×256 is not listed: it spills in the main loop (255
# registers).
TILES = (
    (128, 256, 64, 8, 4),  # 178 / 237
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 4),  # 224 / 226
    (256, 128, 64, 8, 3),
    (128, 128, 64, 8, 3),  # 118 / 120: with 3 stages or fewer, two programs fit a multiprocessor
    (128, 128, 64, 8, 4),
    (128, 128, 64, 8, 2),
    (128, 128, 128, 8, 3),
    (128, 128, 64, 4, 4),  # 170 / 228
    (64, 256, 64, 4, 3),  # 235 / 237
    (64, 128, 64, 4, 4),  # 100 / 126
    (64, 128, 64, 4, 3),
    (256, 64, 64, 8, 4),  # 92 / 120
    (256, 64, 64, 8, 3),
    (128, 64, 64, 4, 4),  # 92 / 121
    (128, 64, 64, 4, 3),
)


@triton.jit
def finish_tile(
    acc, bias_ptr, residual_desc, y_desc, corner, column,
    K: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Add bias and residual to a tile of sums, apply ReLU, store. The tile starts at ``corner`` and ``column``.

    With SPLIT the two halves of the columns are stored one after the other, which halves the shared memory needed.
    """
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    offs_k = column + tl.arange(0, BLOCK_N)
    acc += tl.load(bias_ptr + offs_k, mask=offs_k < K, other=0.0)[None, :]
    if SPLIT:
        HALF: tl.constexpr = BLOCK_N // 2
        low, high = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        _add_and_store(low, residual_desc, y_desc, corner + (column,), HAS_RESIDUAL, RELU)
        _add_and_store(high, residual_desc, y_desc, corner + (column + HALF,), HAS_RESIDUAL, RELU)
    else:
        _add_and_store(acc, residual_desc, y_desc, corner + (column,), HAS_RESIDUAL, RELU)


@triton.jit
def _add_and_store(acc, residual_desc, y_desc, place, HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr):
    if HAS_RESIDUAL:
        acc += residual_desc.load(place).reshape(acc.shape).to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    y_desc.store(place, acc.to(y_desc.dtype).reshape(y_desc.block_shape))


def persistent(config: ConvConfig) -> bool:
    """Return True if each program loops over tiles, instead of computing one tile per program."""
    return config.kernel.endswith("_persistent")


def splits_epilogue(config: ConvConfig) -> bool:
    """Return True if the epilogue works on halves. Halves under 64 columns would not fill 128-byte rows of TMA."""
    return config.block_n >= 128


def out_columns(config: ConvConfig) -> int:
    """Return the width of the boxes of y and the residual."""
    return config.block_n // 2 if splits_epilogue(config) else config.block_n


def tma_shared_memory(config: ConvConfig, *, residual: bool, out_itemsize: int = 2) -> int:
    """Return an upper bound of a program's shared memory in bytes, within 2 KiB of the compiler's figure.

    The epilogue's boxes reuse the pipeline's memory, except in persistent kernels, whose pipeline never drains.
    """
    pipeline = config.num_stages * (config.block_m + config.block_n) * config.block_k * 2
    box = config.block_m * out_columns(config)
    epilogue = box * out_itemsize + (box * 2 if residual else 0)
    barriers_and_bias = 256 + 4 * config.block_n
    return (pipeline + epilogue if persistent(config) else max(pipeline, epilogue)) + barriers_and_bias


def tma_fits(config: ConvConfig, gpu: Gpu, *, residual: bool, out_itemsize: int = 2) -> bool:
    """Return True if ``gpu`` has the shared memory of a program. A launch that does not fit raises a Triton error."""
    return tma_shared_memory(config, residual=residual, out_itemsize=out_itemsize) <= gpu.shared_memory


def programs_per_multiprocessor(config: ConvConfig, *, residual: bool, out_itemsize: int = 2) -> int:
    """Return how many programs of a persistent kernel to start per multiprocessor: two if shared memory allows.

    Registers then suffice too: tiles of that size take at most 128 per thread with 8 warps.
    """
    need = tma_shared_memory(config, residual=residual, out_itemsize=out_itemsize) + RESERVED_SHARED_MEMORY
    return 2 if 2 * need <= MULTIPROCESSOR_SHARED_MEMORY else 1


def tile_constants(dtype: torch.dtype, config: ConvConfig, *, residual: bool, relu: bool) -> dict[str, Any]:
    """Return the compile-time arguments that the matrix product and the convolution have in common."""
    return {
        "HAS_RESIDUAL": residual,
        "RELU": relu,
        "UPCAST": dot_upcast(dtype),
        "PERSISTENT": persistent(config),
        "SPLIT": splits_epilogue(config),
        **config.blocks,
    }


def tile_boxes(config: ConvConfig, leading: tuple[int, ...] = ()) -> dict[str, list[int]]:
    """Return the box that each descriptor moves, by kernel argument. Activations have ``leading`` dimensions first."""
    tile, out = [*leading, config.block_m, config.block_k], [*leading, config.block_m, out_columns(config)]
    return {
        "x_desc": tile,
        "u_desc": tile,
        "w_desc": [config.block_n, config.block_k],
        "residual_desc": out,
        "y_desc": out,
    }


def tile_grid(tiles: int, config: ConvConfig, gpu: Gpu, *, residual: bool, out_itemsize: int = 2) -> tuple[int]:
    """Return the grid: one program per tile or, for a persistent kernel, at most as many as run at the same time."""
    if not persistent(config):
        return (tiles,)
    resident = programs_per_multiprocessor(config, residual=residual, out_itemsize=out_itemsize)
    return (min(tiles, resident * gpu.multiprocessors),)


def tma_candidates(kernels: tuple[str, ...]) -> tuple[ConvConfig, ...]:
    """Return a configuration for every tile of each of ``kernels``."""
    return tuple(ConvConfig(kernel, *tile) for kernel in kernels for tile in TILES)


def why_not_tma(dtype: torch.dtype, gpu: Gpu, *channels: int) -> str:
    """Return the reason why the TMA kernels cannot run layers with these channel counts; empty if they can."""
    if gpu is not INTERPRETER and gpu.arch != "sm_90":
        return f"the TMA kernels need sm_90, but {gpu.name} is {gpu.arch}"
    if dtype not in TMA_DTYPES:
        return f"the TMA kernels take float16 and bfloat16, not {dtype_name(dtype)}"
    if odd := [channel for channel in channels if channel % TMA_CHANNELS]:
        return f"TMA needs channel counts divisible by {TMA_CHANNELS}, not {odd[0]}"
    return ""


def check_tma(op: str, gpu: Gpu, x: Tensor, **tensors: Tensor | None) -> None:
    """Raise an error if TMA cannot describe a tensor, or if a tensor other than ``y`` has another dtype than ``x``."""
    if x.dtype not in TMA_DTYPES:
        raise DtypeError(f"{op}: x is {dtype_name(x.dtype)} and must be float16, bfloat16")
    for name, tensor in {"x": x, **tensors}.items():
        if tensor is None:
            continue
        if name != "y":
            check_dtype(op, name, tensor, x.dtype)
        if tensor.data_ptr() % 16:
            raise KernelError(f"{op}: {name} starts {tensor.data_ptr() % 16} bytes past a multiple of 16; clone it")
        if reason := why_not_tma(x.dtype, gpu, tensor.shape[-1]):
            raise KernelError(f"{op}: {name} is {list(tensor.shape)}; {reason}")


def check_operands(
    op: str, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, shortcut: Tensor | None
) -> None:
    """Raise an error if the tensors of a TMA kernel do not fit each other. The caller checks weight's and y's sizes."""
    check_tensors(op, x.device, x=x, weight=weight, bias=bias, residual=residual, shortcut=shortcut, y=y)
    check_tma(op, gpu_of(x.device), x, weight=weight, residual=residual, shortcut=shortcut, y=y)
    check_dtype(op, "bias", bias, torch.float32)
    check_dtype(op, "y", y, x.dtype, torch.float32)
    check_shape(op, "bias", bias, (weight.shape[0],))
    if residual is not None:
        check_shape(op, "residual", residual, tuple(y.shape))


def merge_shortcut_weight(weight: Tensor, shortcut_weight: Tensor) -> Tensor:
    """Concatenate the reductions of ``weight`` [K, R, S, C] and a 1×1 ``shortcut_weight`` [K, 1, 1, U].

    Returns [K, R·S·C + U]. The caller adds the biases of the two convolutions.
    """
    return torch.cat([weight.flatten(1), shortcut_weight.flatten(1)], 1)
