"""Convolution + bias + residual + ReLU for large batches through Hopper's tensor memory accelerator (TMA).

    y[n, p, q, k] = relu(bias[k] + residual[n, p, q, k]
                         + Σ_{r, s, c} x[n, p·stride + r − padding, q·stride + s − padding, c] · w[k, r, s, c]
                         + Σ_c u[n, p·t, q·t, c] · w'[k, c])

The last sum exists only with a ``shortcut`` u: a block's 1×1 projection of stride t, merged into its last convolution.
The two reductions are concatenated (w' follows w in the rows of the weight), so the projected shortcut is never written
to memory.

A tile is one output pixel of BLOCK_M *images* × BLOCK_N channels: activations, NHWC in memory, are described to TMA
with permuted dimensions [H, W, N, C], so a box [1, 1, BLOCK_M, BLOCK_K] is the same input pixel of BLOCK_M images.
Stride, padding and filter only select the pixel, and no tile crosses rows. With one tile per program, taps outside the
image are skipped instead of multiplied as zeros (18 % of the taps of a 3×3 filter on 7×7 pixels). The unit dimensions
come first, so Triton drops them and wgmma reads both operands from shared memory.

Activations are NHWC of float16 or bfloat16, weights KRSC, bias float32 [K]; accumulation is float32. Any N, H, W, R, S
and stride work, and any padding smaller than the filter; channel counts are multiples of 8. Batches under 64 waste most
of a tile; the pointer kernel (``conv.py``) suits them better. Needs an NVIDIA GPU of the sm_90 family.
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

from .launch import cdiv, check_shape, device_guard
from .tma import (
    check_operands,
    finish_tile,
    persistent,
    tile_boxes,
    tile_constants,
    tile_grid,
    tma_candidates,
    why_not_tma,
)

# The first runs one program per tile. The second runs as many programs as fit the GPU; each loops over tiles with its
# loads always ahead, but multiplies the taps outside the image too.
KERNELS = ("conv_tma", "conv_tma_persistent")

# Configurations to time. Not all fit every layer: a residual or a float32 output needs shared memory
# (``tma_shared_memory``).
CANDIDATES = tma_candidates(KERNELS)

# The smallest batch that does not leave most of a tile empty: Hopper's wgmma needs 64 rows.
MIN_BATCH = 64


@triton.jit(do_not_specialize=["N"])
def conv_tma_kernel(
    x_desc,  # [H, W, N, C], boxes [1, 1, BLOCK_M, BLOCK_K]
    u_desc,  # [H', W', N, U], boxes [1, 1, BLOCK_M, BLOCK_K]
    w_desc,  # [K, R · S · C + U], boxes [BLOCK_N, BLOCK_K]
    bias_ptr,
    residual_desc,  # [P, Q, N, K], boxes [1, 1, BLOCK_M, BLOCK_N], or of half that width with SPLIT
    y_desc,  # like residual_desc
    N,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    U: tl.constexpr,  # 0: no shortcut
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SHORTCUT_STRIDE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32: the interpreter has no bfloat16 dot
    PERSISTENT: tl.constexpr,
    SKIP: tl.constexpr,  # leave out the taps outside the image
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first = tl.program_id(0)
    if PERSISTENT:
        tiles = tl.cdiv(N, BLOCK_M) * (P * Q * ((K + BLOCK_N - 1) // BLOCK_N))
        for tile in tl.range(first, tiles, tl.num_programs(0), flatten=True):
            _tile(
                tile, x_desc, u_desc, w_desc, bias_ptr, residual_desc, y_desc,
                H, W, P, Q, C, U, K, R, S, STRIDE, PADDING, SHORTCUT_STRIDE, HAS_RESIDUAL, RELU, UPCAST,
                SKIP, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        _tile(
            first, x_desc, u_desc, w_desc, bias_ptr, residual_desc, y_desc,
            H, W, P, Q, C, U, K, R, S, STRIDE, PADDING, SHORTCUT_STRIDE, HAS_RESIDUAL, RELU, UPCAST,
            SKIP, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _tile(
    tile, x_desc, u_desc, w_desc, bias_ptr, residual_desc, y_desc,
    H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, U: tl.constexpr,
    K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    SHORTCUT_STRIDE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, UPCAST: tl.constexpr,
    SKIP: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute and store one tile. All pixels of one block of images come before the next block, so that neighbouring
    tiles, which share input pixels, run together."""
    N_BLOCKS: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    C_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    U_BLOCKS: tl.constexpr = (U + BLOCK_K - 1) // BLOCK_K
    column = (tile % N_BLOCKS) * BLOCK_N
    pixel = tile // N_BLOCKS
    q = pixel % Q
    p = (pixel // Q) % P
    image = (pixel // (P * Q)) * BLOCK_M
    top = p * STRIDE - PADDING
    left = q * STRIDE - PADDING
    if SKIP:  # the taps inside the image: rows r0 and on, columns s0 and on
        r0 = tl.maximum(-top, 0)
        s0 = tl.maximum(-left, 0)
        s_count = tl.minimum(W - left, S) - s0
        blocks = (tl.minimum(H - top, R) - r0) * s_count * C_BLOCKS
    else:
        r0 = 0
        s0 = 0
        s_count = S
        blocks = R * S * C_BLOCKS
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(blocks + U_BLOCKS):
        tap = block // C_BLOCKS
        c = (block % C_BLOCKS) * BLOCK_K
        r = r0 + tap // s_count
        s = s0 + tap % s_count
        desc = x_desc
        h = top + r
        w = left + s
        w_c = (r * S + s) * C + c
        if U > 0:  # noqa: SIM102 (one is decided at compile time, the other at run time)
            if block >= blocks:  # selects the descriptor: one load, one pipeline
                desc = u_desc
                h = p * SHORTCUT_STRIDE
                w = q * SHORTCUT_STRIDE
                c = (block - blocks) * BLOCK_K
                w_c = R * S * C + c
        # Outside the image and past C the box of x is zero, so the weight's values there do not matter.
        x = desc.load([h, w, image, c]).reshape(BLOCK_M, BLOCK_K)
        weight = w_desc.load([column, w_c])
        if UPCAST:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(x, weight.T, acc)

    finish_tile(acc, bias_ptr, residual_desc, y_desc, (p, q, image), column, K, HAS_RESIDUAL, RELU, SPLIT)


def conv_tma_constants(
    shape: ConvShape,
    dtype: torch.dtype,
    config: ConvConfig,
    *,
    residual: bool,
    relu: bool,
    shortcut_channels: int = 0,
    shortcut_stride: int = 1,
) -> dict[str, Any]:
    """Return the compile-time arguments, the same for a launch and for an ahead-of-time compilation."""
    return {
        **shape.constants,
        "U": shortcut_channels,
        "SHORTCUT_STRIDE": shortcut_stride,
        # Triton flattens nested loops only if the inner loop has a fixed length.
        "SKIP": shape.padding > 0 and not persistent(config),
        **tile_constants(dtype, config, residual=residual, relu=relu),
    }


def conv_tma_boxes(config: ConvConfig) -> dict[str, list[int]]:
    """Return the box that each descriptor moves, by kernel argument: one pixel of BLOCK_M images."""
    return tile_boxes(config, leading=(1, 1))


def conv_tma_grid(
    shape: ConvShape, config: ConvConfig, gpu: Gpu, *, residual: bool, out_itemsize: int = 2
) -> tuple[int]:
    """Return the grid of a launch; see :func:`.tma.tile_grid`."""
    tiles = cdiv(shape.N, config.block_m) * shape.P * shape.Q * cdiv(shape.K, config.block_n)
    return tile_grid(tiles, config, gpu, residual=residual, out_itemsize=out_itemsize)


def valid_taps(shape: ConvShape) -> float:
    """Return the share of filter taps inside the image: the share of products left if the others are skipped."""
    rows = list(range(-shape.padding, shape.P * shape.stride - shape.padding, shape.stride))
    columns = list(range(-shape.padding, shape.Q * shape.stride - shape.padding, shape.stride))
    inside_h = sum(min(shape.H - top, shape.R) - max(-top, 0) for top in rows)
    inside_w = sum(min(shape.W - left, shape.S) - max(-left, 0) for left in columns)
    return inside_h * inside_w / (shape.P * shape.Q * shape.R * shape.S)


def why_not_conv_tma(shape: ConvShape, dtype: torch.dtype, gpu: Gpu) -> str:
    """Return the reason why this kernel cannot or should not run a convolution; empty if it can."""
    if shape.groups != 1:
        return "the TMA convolution takes no groups"
    if shape.padding >= min(shape.R, shape.S):
        return f"padding {shape.padding} must be smaller than the {shape.R}×{shape.S} filter"
    if shape.N < MIN_BATCH:
        return f"the TMA convolution takes batches of {MIN_BATCH} images or more, not {shape.N}"
    return why_not_tma(dtype, gpu, shape.C, shape.K)


def describe(activation: Tensor, box: list[int]) -> TensorDescriptor:
    """Describe ``activation`` [N, H, W, C] with dimensions [H, W, N, C]."""
    n, h, w, c = activation.shape
    return TensorDescriptor(activation, [h, w, n, c], [w * c, c, h * w * c, 1], box)


def conv_tma_into(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    *,
    filter_size: tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    shortcut_stride: int = 1,
    relu: bool = False,
    config: ConvConfig,
) -> None:
    """Write the convolution of ``x`` into ``y``.

    ``x`` [N, H, W, C], ``weight`` [K, R·S·C + U] (KRSC, flattened, and with a shortcut concatenated:
    ``tma.merge_shortcut_weight``), ``bias`` float32 [K], ``y`` and ``residual`` [N, P, Q, K], ``shortcut``
    [N, H', W', U], which is read at multiples of ``shortcut_stride``; ``filter_size`` is (R, S). All are contiguous, on
    one device and aligned to 16 bytes. ``x``, ``weight``, ``residual`` and ``shortcut`` share one dtype: float16 or
    bfloat16. ``y`` has that dtype or float32. ``y`` may be the same tensor as ``residual``, but must not overlap any
    other tensor. Arguments are not checked here; see :func:`check_conv_tma`.
    """
    shape = conv_tma_shape(x, weight, filter_size, stride, padding)
    u = 0 if shortcut is None else shortcut.shape[3]
    boxes = conv_tma_boxes(config)
    activations = {"x_desc": x, "u_desc": shortcut, "residual_desc": residual, "y_desc": y}
    descriptors = {
        name: None if tensor is None else describe(tensor, boxes[name]) for name, tensor in activations.items()
    }
    constants = conv_tma_constants(
        shape,
        x.dtype,
        config,
        residual=residual is not None,
        relu=relu,
        shortcut_channels=u,
        shortcut_stride=shortcut_stride,
    )
    gpu = gpu_of(x.device)
    grid = conv_tma_grid(shape, config, gpu, residual=residual is not None, out_itemsize=y.element_size())
    with device_guard(x.device):
        conv_tma_kernel[grid](
            **descriptors,
            w_desc=TensorDescriptor.from_tensor(weight, boxes["w_desc"]),
            bias_ptr=bias,
            N=shape.N,
            **constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def conv_tma_shape(x: Tensor, weight: Tensor, filter_size: tuple[int, int], stride: int, padding: int) -> ConvShape:
    """Return the sizes of the convolution of ``x`` [N, H, W, C] with ``weight`` [K, R·S·C + U]."""
    n, h, w, c = x.shape
    return ConvShape(n, h, w, c, weight.shape[0], *filter_size, stride, padding)


def check_conv_tma(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    shortcut: Tensor | None,
    shape: ConvShape,
    shortcut_stride: int,
    op: str = "fastres::conv_tma",
) -> None:
    """Raise an error if :func:`conv_tma_into` cannot take the tensors."""
    check_operands(op, y, x, weight, bias, residual, shortcut)
    if shape.P < 1 or shape.Q < 1:
        raise KernelError(f"{op}: a {shape.R}×{shape.S} filter does not fit images of {shape.H}×{shape.W}")
    if shape.padding >= min(shape.R, shape.S):
        raise KernelError(f"{op}: padding {shape.padding} must be smaller than the {shape.R}×{shape.S} filter")
    u = 0 if shortcut is None else shortcut.shape[-1]
    check_shape(op, "weight", weight, (shape.K, shape.R * shape.S * shape.C + u))
    check_shape(op, "y", y, (shape.N, shape.P, shape.Q, shape.K))
    if shortcut is not None:
        n, h, w, _ = shortcut.shape
        reached = (n, cdiv(h, shortcut_stride), cdiv(w, shortcut_stride))
        if reached != (shape.N, shape.P, shape.Q):
            raise KernelError(
                f"{op}: shortcut is {list(shortcut.shape)}; at stride {shortcut_stride} that is {reached[0]} images of "
                f"{reached[1]}×{reached[2]} and must be {shape.N} of {shape.P}×{shape.Q}"
            )


def conv_tma(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    *,
    filter_size: tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    shortcut_stride: int = 1,
    relu: bool = False,
    config: ConvConfig,
) -> Tensor:
    """Check the arguments (see :func:`conv_tma_into`) and return the convolution as a new tensor [N, P, Q, K]."""
    shape = conv_tma_shape(x, weight, filter_size, stride, padding)
    y = x.new_empty(shape.N, max(shape.P, 0), max(shape.Q, 0), shape.K)
    check_conv_tma(y, x, weight, bias, residual, shortcut, shape, shortcut_stride)
    if y.numel():
        conv_tma_into(
            y,
            x,
            weight,
            bias,
            residual,
            shortcut,
            filter_size=filter_size,
            stride=stride,
            padding=padding,
            shortcut_stride=shortcut_stride,
            relu=relu,
            config=config,
        )
    return y
