"""The stem in one kernel: normalise, convolve, add bias, ReLU and, for ImageNet networks, max-pool.

    z[n, p, q, k] = relu(bias[k] + Σ_{r, s, c} v[n, p·stride + r − padding, q·stride + s − padding, c] · w[k, r, s, c])
    y = z, or with pooling y[n, i, j, k] = max over the 3×3 window of z centred at (2i, 2j)

v is the input itself (floating point) or ``x · scale[c] + shift[c]`` (uint8 pixels), and 0 outside the image. The input
has three channels in any memory layout. Its strides are arguments, so the kernel reads NCHW and NHWC batches in place.
With pooling, a program walks down a strip of pooled rows. Each pooled row needs two new convolution rows and reuses the
last one, so only the first row of a strip is computed twice. ReLU output is never negative, so 0 serves as the pool's
padding.

The reduction over (s, c) of one filter row counts four channels per tap, the last of them empty, and is padded to
``J``, a power of two. Weights are packed [K, R, J] to match (:func:`pack_stem_weight`). Output is NHWC.

Three channels in any layout are loaded two bytes at a time. For larger batches, another kernel
(:mod:`fastres.kernels.prepare`) first writes the images once: normalised, padded, and with four channels per pixel. The
taps of an output pixel are then contiguous, so loads move 16 bytes and run ahead of the products. Such a load covers
one tap more than the filter has, with zero weights. A pixel that is not finite therefore also spoils the output to its
left.

Where ``routing/rules.py`` says so, another kernel (:mod:`fastres.kernels.stem_strip`) computes the pooled stem of
prepared images, and loads each of their rows once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.errors import KernelError
from fastres.kernels.routing.cards import gpu_of
from fastres.kernels.routing.rules import STRIP, StemConfig, route_stem

from .launch import (
    ACTIVATION_DTYPES,
    INT32_ELEMENTS,
    cdiv,
    check_dtype,
    check_shape,
    check_tensors,
    device_guard,
    dot_upcast,
    float32_precision,
    kernel_op,
    launchable,
    next_power_of_2,
    start_options,
    wait_for_inputs,
)
from .prepare import ALIGNED, prepare
from .stem_strip import stem_strip_into

CHANNELS = 3
LANES = 4  # channels per pixel in packed weights and prepared images


@triton.jit
def _conv_row(
    x_ptr,
    w_ptr,
    bias,
    scale,
    shift,
    x_offs,
    mask_x,
    mask_column,
    row,
    P,
    H,
    stride_h,
    w_offs,
    R: tl.constexpr,
    J: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PREPARED: tl.constexpr,
    NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row of the convolution after ReLU, float32 [BLOCK_Q, BLOCK_K]; zeros outside the output."""
    acc = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for r in range(R):
        if PREPARED:  # already padded: no masks, 16-byte loads. Rows outside the output are zeroed below
            h = tl.minimum(tl.maximum(row, 0), P - 1) * STRIDE + r
            x = tl.load(x_ptr + h * stride_h + x_offs)
        else:
            h = row * STRIDE - PADDING + r
            mask = mask_x & (h >= 0) & (h < H)
            x = tl.load(x_ptr + h * stride_h + x_offs, mask=mask, other=0)
        w = tl.load(w_ptr + r * J + w_offs)
        if NORMALISE:
            x = tl.where(mask, x.to(tl.float32) * scale[None, :] + shift[None, :], 0.0)
        if UPCAST:
            acc = tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x.to(w.dtype), w, acc, input_precision=PRECISION)
    acc = tl.maximum(acc + bias[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(mask_column[:, None] & (row >= 0) & (row < P), acc, 0.0)


@triton.jit(
    do_not_specialize=["H", "W", "P", "Q", "POOL_P", "POOL_Q", "row_blocks", "column_blocks"],
    do_not_specialize_on_alignment=["stride_n", "stride_c", "stride_h", "stride_w"],
)
def stem_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    H,
    W,
    P,  # convolution output
    Q,
    POOL_P,  # pooled output; P and Q without pooling
    POOL_Q,
    row_blocks,
    column_blocks,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    J: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    POOL: tl.constexpr,
    PREPARED: tl.constexpr,  # x is padded and normalised, with 4 channels per pixel (prepare.py)
    NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if EARLY:
        wait_for_inputs()
    pid = tl.program_id(0)
    column_block = pid % column_blocks
    row_block = (pid // column_blocks) % row_blocks
    image = (pid // (column_blocks * row_blocks)).to(tl.int64)
    if PREPARED:  # strides count units of 16 elements (ALIGNED): the compiler sees that loads are aligned
        stride_n *= 16
        stride_h *= 16
    x_ptr += image * stride_n
    y_ptr += image * (POOL_P * POOL_Q * K)

    # Convolution columns of this program. With pooling, its first pooled column needs one column to the left.
    HALF: tl.constexpr = BLOCK_Q // 2
    first = column_block * (2 * HALF - 2) - 1 if POOL else column_block * BLOCK_Q
    offs_q = first + tl.arange(0, BLOCK_Q)
    mask_column = (offs_q >= 0) & (offs_q < Q)
    offs_j = tl.arange(0, J)
    if PREPARED:
        x_offs = (tl.minimum(tl.maximum(offs_q, 0), Q - 1) * (STRIDE * 4))[:, None] + offs_j[None, :]
        mask_x = True  # everything is inside, and empty lanes meet zero weights
    else:
        left = offs_q * STRIDE - PADDING
        column = left[:, None] + (offs_j // 4)[None, :]
        x_offs = column * stride_w + (offs_j % 4)[None, :] * stride_c  # [BLOCK_Q, J]
        mask_x = (column >= 0) & (column < W) & ((offs_j < S * 4) & (offs_j % 4 < 3))[None, :]
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    # Channels past K read the last channel's weights and are not stored.
    w_offs = tl.minimum(offs_k, K - 1)[None, :] * (R * J) + offs_j[:, None]  # [J, BLOCK_K]
    bias = tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0)
    scale = tl.load(scale_ptr + offs_j)
    shift = tl.load(shift_ptr + offs_j)
    Y = y_ptr.dtype.element_ty

    if POOL:
        offs_i = tl.arange(0, HALF)
        # Pooled column i spans this program's convolution columns 2i, 2i + 1 and 2i + 2; the last i has no 2i + 2.
        pool_q = column_block * (HALF - 1) + offs_i
        mask_pool = ((offs_i < HALF - 1) & (pool_q < POOL_Q))[:, None] & mask_k[None, :]
        index0 = tl.broadcast_to((2 * offs_i)[:, None], (HALF, BLOCK_K))
        index1 = tl.broadcast_to((2 * offs_i + 1)[:, None], (HALF, BLOCK_K))
        index2 = tl.broadcast_to(tl.minimum(2 * offs_i + 2, BLOCK_Q - 1)[:, None], (HALF, BLOCK_K))
        rows = 2 * ROWS + 1
        first_row = 2 * row_block * ROWS - 1
    else:
        rows = ROWS
        first_row = row_block * ROWS
    highest = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32 if UPCAST else Y)  # over the rows of the current window
    for i in range(rows):
        row = first_row + i
        z = _conv_row(
            x_ptr, w_ptr, bias, scale, shift, x_offs, mask_x, mask_column, row, P, H, stride_h, w_offs,
            R, J, STRIDE, PADDING, PREPARED, NORMALISE, PRECISION, UPCAST, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        if POOL:
            z = z.to(highest.dtype)
            highest = tl.maximum(highest, z, propagate_nan=tl.PropagateNan.ALL).to(z.dtype)  # bfloat16 gives float32
            if row % 2 == 1 and i > 0:  # the window of pooled row (row − 1) / 2 is complete; this row starts the next
                pool_p = row // 2
                y = tl.maximum(
                    tl.gather(highest, index0, 0), tl.gather(highest, index1, 0), propagate_nan=tl.PropagateNan.ALL
                )
                y = tl.maximum(y, tl.gather(highest, index2, 0), propagate_nan=tl.PropagateNan.ALL)
                y_offs = (pool_p * POOL_Q + pool_q)[:, None] * K + offs_k[None, :]
                tl.store(y_ptr + y_offs, y.to(Y), mask=mask_pool & (pool_p < POOL_P))
                highest = z
                # The next row's first weights overwrite the shared memory that the gathers exchanged data through, so
                # all threads must have read it. Triton 3.6.0 and 3.7.1 leave out this barrier.
                tl.debug_barrier()
        else:
            y_offs = (row * Q + offs_q)[:, None] * K + offs_k[None, :]
            tl.store(y_ptr + y_offs, z.to(Y), mask=mask_column[:, None] & mask_k[None, :] & (row < P))


def pack_stem_weight(weight: Tensor) -> Tensor:
    """Pack ``weight`` [K, R, S, 3] as [K, R, J], with J = S·4 rounded up to a power of two of at least 16."""
    k, r, s, c = weight.shape
    packed = weight.new_zeros(k, r, max(16, next_power_of_2(s * LANES)))
    packed.unflatten(2, (-1, LANES))[:, :, :s, :c] = weight
    return packed


def pack_normalisation(
    mean: Sequence[float], std: Sequence[float], j: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ``scale`` and ``shift``, float32 [J].

    ``pixel · scale + shift`` is ``(pixel / 255 − mean) / std`` for each channel.
    """
    scale = [*(1 / (255 * s) for s in std), 0.0]
    shift = [*(-m / s for m, s in zip(mean, std, strict=True)), 0.0]
    scales, shifts = (
        torch.tensor([values[lane % LANES] for lane in range(j)], dtype=torch.float32, device=device)
        for values in (scale, shift)
    )
    return scales, shifts


def stem_output_sizes(h: int, w: int, kernel: int, stride: int, padding: int, pool: bool) -> tuple[int, int, int, int]:
    """Return the convolution's output height and width, then the stem's."""
    p, q = (h + 2 * padding - kernel) // stride + 1, (w + 2 * padding - kernel) // stride + 1
    return (p, q, (p - 1) // 2 + 1, (q - 1) // 2 + 1) if pool else (p, q, p, q)


def stem_constants(
    weight: Tensor,
    config: StemConfig,
    *,
    stride: int,
    padding: int,
    pool: bool,
    normalise: bool,
    precision: str = "ieee",
) -> dict[str, Any]:
    """Return the kernel's compile-time arguments, for a launch or an ahead-of-time compilation."""
    k, r, j = weight.shape
    return {
        "K": k,
        "R": r,
        "S": r,
        "J": j,
        "STRIDE": stride,
        "PADDING": padding,
        "POOL": pool,
        "PREPARED": config.prepared,
        "NORMALISE": normalise,
        "PRECISION": precision,
        "UPCAST": dot_upcast(weight.dtype),
        "ROWS": config.rows,
        "BLOCK_Q": config.block_q,
        "BLOCK_K": max(16, next_power_of_2(k)),
    }


def stem_into(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    stride: int,
    padding: int,
    pool: bool,
    config: StemConfig | None = None,
    traceable: bool = False,
) -> None:
    """Write the stem of ``x`` into ``y``; ``config`` overrides the routing.

    ``x`` [N, 3, H, W] with any strides, uint8 or floating point; ``weight`` [K, R, J] from :func:`pack_stem_weight`
    (square filters), ``bias`` float32 [K], ``scale`` and ``shift`` float32 [J], ``y`` [N, P, Q, K] contiguous with
    ``weight``'s dtype. With a ``prepared`` configuration, :mod:`fastres.kernels.prepare` runs first.
    """
    n, _, h, w = x.shape
    p, q, out_p, out_q = stem_output_sizes(h, w, weight.shape[1], stride, padding, pool)
    if config is None:
        settings = (gpu_of(x.device), pool, float32_precision(), (weight.shape[1], stride, padding))
        config = route_stem(weight.shape[0], (n, p, q), weight.dtype, *settings)
    strides: tuple[int, ...] = x.stride()
    if config.prepared:
        taps = weight.shape[2] // LANES
        x = prepare(x, weight.dtype, scale, shift, padding=padding, taps=taps, traceable=traceable)
        if config.kernel == STRIP:
            stem_strip_into(y, x, weight, bias, pixels=(p, q), config=config, traceable=traceable)
            return
        strides = (x.stride(0) // ALIGNED, 0, x.stride(1) // ALIGNED, 0)
    row_blocks = cdiv(out_p, config.rows)
    columns = config.block_q // 2 - 1 if pool else config.block_q
    column_blocks = cdiv(out_q, columns)
    constants = stem_constants(
        weight,
        config,
        stride=stride,
        padding=padding,
        pool=pool,
        normalise=x.dtype == torch.uint8,
        precision=float32_precision(),
    )
    with device_guard(x.device):
        launchable(stem_kernel, traceable)[(n * row_blocks * column_blocks,)](
            x,
            weight,
            bias,
            scale,
            shift,
            y,
            h,
            w,
            p,
            q,
            out_p,
            out_q,
            row_blocks,
            column_blocks,
            *strides,
            **constants,
            **start_options(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


@kernel_op("stem", mutates_args=())
def stem(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, stride: int, padding: int, pool: bool
) -> Tensor:
    """Run the stem as the registered op ``torch.ops.fastres.stem``; return [N, P, Q, K] in ``weight``'s dtype.

    The shapes are those of :func:`stem_into`. Raises ``KernelError``, ``DtypeError`` or ``DeviceError``.
    """
    op = "fastres::stem"
    check_tensors(op, x.device, weight=weight, bias=bias, scale=scale, shift=shift)
    check_dtype(op, "x", x, torch.uint8, *ACTIVATION_DTYPES)
    check_dtype(op, "weight", weight, *ACTIVATION_DTYPES)
    n, c, h, w = x.shape
    k, r, j = weight.shape
    if c != CHANNELS:
        raise KernelError(f"{op}: x is {list(x.shape)} and must have {CHANNELS} channels")
    if x[0].numel() >= INT32_ELEMENTS:
        raise KernelError(f"{op}: an image of {h}×{w} has 2³¹ elements or more; resize it")
    check_shape(op, "bias", bias, (k,))
    check_shape(op, "scale", scale, (j,))
    check_shape(op, "shift", shift, (j,))
    *_, p, q = stem_output_sizes(h, w, r, stride, padding, pool)
    y = weight.new_empty(n, max(p, 0), max(q, 0), k)
    if y.numel():
        stem_into(y, x, weight, bias, scale, shift, stride=stride, padding=padding, pool=pool, traceable=True)
    return y
