"""1×1 convolution + bias + residual + ReLU as a plain matrix product through Hopper's tensor memory accelerator (TMA).

    y[m, k] = relu(bias[k] + residual[m, k] + Σ_c x[m, c] · w[k, c] + Σ_c u[m, c] · w[k, C + c])

Row m is one pixel of one image: for a 1×1 convolution of stride 1, NHWC activations already are the matrix. The last
sum exists only with a ``shortcut`` u: a block's 1×1 projection, merged into its last convolution. The two reductions
are concatenated, so the projected shortcut is never written to memory.

TMA moves tiles of x, w, u, residual and y between memory and shared memory. It addresses 2-D boxes itself, reads zeros
outside the matrix and writes nothing there, so the kernel needs no masks or offsets, and the tensor-core instruction
(wgmma) reads both operands from shared memory. A persistent program loops over output tiles in one flattened loop, so
the loads of a tile are in flight while the previous tile is stored. The epilogue processes a wide tile in two halves,
which halves the shared memory it needs.

Activations are row-major [M, C] of float16 or bfloat16, weights [K, C], bias float32 [K]; accumulation is float32. C, U
and K are multiples of 8 (TMA strides are multiples of 16 bytes). M can be any number. Needs an NVIDIA GPU of the sm_90
family.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.errors import KernelError
from fastres.kernels.routing.cards import Gpu, gpu_of
from fastres.kernels.routing.rules import ConvConfig, ConvShape

from .launch import INT32_ELEMENTS, cdiv, check_shape, device_guard
from .tma import (
    check_operands,
    finish_tile,
    tile_boxes,
    tile_constants,
    tile_grid,
    tma_candidates,
    why_not_tma,
)

# The first runs one program per tile. The second runs as many programs as fit the GPU; each loops over tiles with its
# loads always ahead.
KERNELS = ("gemm", "gemm_persistent")

# Configurations to time. Not all fit every layer: a residual or a float32 output needs shared memory
# (``tma_shared_memory``).
CANDIDATES = tma_candidates(KERNELS)


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x_desc,  # [M, C], boxes [BLOCK_M, BLOCK_K]
    u_desc,  # [M, U], boxes [BLOCK_M, BLOCK_K]
    w_desc,  # [K, C + U], boxes [BLOCK_N, BLOCK_K]
    bias_ptr,
    residual_desc,  # [M, K], boxes [BLOCK_M, BLOCK_N], or of half that width with SPLIT
    y_desc,  # like residual_desc
    M,
    C: tl.constexpr,
    U: tl.constexpr,  # 0: no shortcut
    K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32: the interpreter has no bfloat16 dot
    PERSISTENT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first = tl.program_id(0)
    if PERSISTENT:
        tiles = tl.cdiv(M, BLOCK_M) * ((K + BLOCK_N - 1) // BLOCK_N)
        for tile in tl.range(first, tiles, tl.num_programs(0), flatten=True):
            _tile(
                tile, x_desc, u_desc, w_desc, bias_ptr, residual_desc, y_desc,
                C, U, K, HAS_RESIDUAL, RELU, UPCAST, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        _tile(
            first, x_desc, u_desc, w_desc, bias_ptr, residual_desc, y_desc,
            C, U, K, HAS_RESIDUAL, RELU, UPCAST, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _tile(
    tile, x_desc, u_desc, w_desc, bias_ptr, residual_desc, y_desc,
    C: tl.constexpr, U: tl.constexpr, K: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    UPCAST: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute and store one tile. Neighbouring tiles share rows of x; all of w stays in the L2 cache."""
    N_BLOCKS: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    C_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    U_BLOCKS: tl.constexpr = (U + BLOCK_K - 1) // BLOCK_K
    row = (tile // N_BLOCKS) * BLOCK_M
    column = (tile % N_BLOCKS) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(C_BLOCKS + U_BLOCKS):
        desc = x_desc
        c = block * BLOCK_K
        w_c = c
        if U > 0:  # noqa: SIM102 (one is decided at compile time, the other at run time)
            if block >= C_BLOCKS:  # selects the descriptor: one load, one pipeline
                desc = u_desc
                c = (block - C_BLOCKS) * BLOCK_K
                w_c = C + c
        # Past C the box of x is zero, so the weight's values there do not matter.
        x = desc.load([row, c])
        w = w_desc.load([column, w_c])
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w.T, acc)

    finish_tile(acc, bias_ptr, residual_desc, y_desc, (row,), column, K, HAS_RESIDUAL, RELU, SPLIT)


def gemm_constants(
    c: int, u: int, k: int, dtype: torch.dtype, config: ConvConfig, *, residual: bool, relu: bool
) -> dict[str, Any]:
    """Return the compile-time arguments, the same for a launch and for an ahead-of-time compilation.

    ``c`` is the number of input channels, ``u`` of shortcut channels (0 without a shortcut), ``k`` of output channels.
    """
    return {
        "C": c,
        "U": u,
        "K": k,
        **tile_constants(dtype, config, residual=residual, relu=relu),
    }


def gemm_grid(m: int, k: int, config: ConvConfig, gpu: Gpu, *, residual: bool, out_itemsize: int = 2) -> tuple[int]:
    """Return the grid of a launch; see :func:`.tma.tile_grid`."""
    tiles = cdiv(m, config.block_m) * cdiv(k, config.block_n)
    return tile_grid(tiles, config, gpu, residual=residual, out_itemsize=out_itemsize)


def why_not_gemm(shape: ConvShape, dtype: torch.dtype, gpu: Gpu) -> str:
    """Return the reason why this kernel cannot run a convolution; empty if it can."""
    if (shape.R, shape.S, shape.stride, shape.padding, shape.groups) != (1, 1, 1, 0, 1):
        return "only an ungrouped 1×1 convolution of stride 1 without padding is a plain matrix product"
    return why_not_tma(dtype, gpu, shape.C, shape.K)


def gemm_into(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    *,
    relu: bool = False,
    config: ConvConfig,
) -> None:
    """Write the product into ``y``.

    ``x`` [M, C], ``weight`` [K, C + U], ``bias`` float32 [K], ``y`` and ``residual`` [M, K], ``shortcut`` [M, U] (U is
    0 without a shortcut); all contiguous, on one device and aligned to 16 bytes. ``x``, ``weight``, ``residual`` and
    ``shortcut`` share one dtype: float16 or bfloat16. ``y`` has that dtype or float32. ``y`` may be the same tensor as
    ``residual``, but must not overlap any other tensor. Arguments are not checked here; see :func:`check_gemm`.
    """
    (m, c), k = x.shape, weight.shape[0]
    u = 0 if shortcut is None else shortcut.shape[1]
    boxes = tile_boxes(config)
    tensors = {"x_desc": x, "u_desc": shortcut, "w_desc": weight, "residual_desc": residual, "y_desc": y}
    descriptors = {
        name: None if tensor is None else TensorDescriptor.from_tensor(tensor, boxes[name])
        for name, tensor in tensors.items()
    }
    constants = gemm_constants(c, u, k, x.dtype, config, residual=residual is not None, relu=relu)
    gpu = gpu_of(x.device)
    grid = gemm_grid(m, k, config, gpu, residual=residual is not None, out_itemsize=y.element_size())
    with device_guard(x.device):
        gemm_kernel[grid](
            **descriptors,
            bias_ptr=bias,
            M=m,
            **constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def check_gemm(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    shortcut: Tensor | None,
) -> None:
    """Raise ``KernelError``, ``DtypeError`` or ``DeviceError`` if :func:`gemm_into` cannot take the tensors."""
    op = "fastres::gemm"
    check_operands(op, y, x, weight, bias, residual, shortcut)
    (m, c), k = x.shape, weight.shape[0]
    u = 0 if shortcut is None else shortcut.shape[-1]
    check_shape(op, "weight", weight, (k, c + u))
    check_shape(op, "y", y, (m, k))
    if shortcut is not None:
        check_shape(op, "shortcut", shortcut, (m, u))
    if m >= INT32_ELEMENTS - 256:
        raise KernelError(f"{op}: {m} rows are more than 2³¹; split the batch")


def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    *,
    relu: bool = False,
    config: ConvConfig,
) -> Tensor:
    """Check the arguments (see :func:`gemm_into`) and return the product as a new tensor [M, K]."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    check_gemm(y, x, weight, bias, residual, shortcut)
    if y.numel():
        gemm_into(y, x, weight, bias, residual, shortcut, relu=relu, config=config)
    return y
