"""The stem in 8 bit: images are prepared, then convolved, with bias, ReLU and, for ImageNet networks, max-pool.

    z[n, p, q, k] = bias[k]
                    + x_scale · weight_scale[k] · Σ_{r, s, c} x[n, p·stride + r, q·stride + s, c] · w[k, r, s, c]
    y[n, p, q, k] = the nearest 8-bit number to relu(z) / output_scale, or with pooling the maximum of these over the
                    3×3 window of z centred at (2p, 2q)

x are the prepared images, [N, H + 2·padding + …, W', 4]: padded, with an empty fourth channel. There are two kinds, as
in :mod:`.conv_8bit`:

- Pixels (int8 form): x is a pixel − 128. Normalised images are first rounded to the pixels that they come from. The
  padding is the pixel nearest to the mean, which stands for 0. weight_scale and bias include the normalisation, x_scale
  is 1, and y is uint8.
- Floats (fp8 form): x is the e4m3 number nearest to the normalised pixel / x_scale, the padding is 0, and y is e4m3.

Images are always prepared by a kernel of their own: it finds room for the fourth channel, the padding and −128, so the
taps of a filter row are contiguous bytes, whatever the layout of the batch. The stem can then copy them into shared
memory ahead of the products. One product covers the whole filter: S·4 bytes of each row, padded to ``J``, of all rows,
padded to a power of two. It is 256 long for a 7×7 filter; a third of it meets zero weights. Products of int8 are waited
for, so one long product is better than seven short ones. The weights stay in shared memory for all rows of a program.

With pooling, a program walks down a strip of pooled rows. Scales are positive, so the largest sum gives the largest
result: the maximum is taken over sums, and only pooled results are scaled and rounded. Each pooled pixel sums its three
columns itself, so the maximum needs no exchange between threads, as it does in :mod:`.stem`, and costs half as many
products again. Neighbouring pooled rows share a row of sums, so only the first row of a strip is computed twice.

On an H100 this kernel is right in int8 and e4m3. No rule chooses it: its speed has not been measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.errors import KernelError
from fastres.kernels.routing.cards import INTERPRETER, Gpu, gpu_of
from fastres.kernels.routing.rules import StemConfig

from .conv_8bit import E4M3, LEVELS, compensation, rounded, signed, why_not_8bit
from .launch import (
    ACTIVATION_DTYPES,
    INT32_ELEMENTS,
    cdiv,
    check_dtype,
    check_shape,
    check_tensors,
    device_guard,
    kernel_op,
    launchable,
    next_power_of_2,
    start_options,
    wait_for_inputs,
)
from .prepare import ALIGNED, BLOCK_W, prepared_size
from .stem import CHANNELS, LANES, stem_output_sizes


@triton.jit(
    do_not_specialize=["H", "W", "HP", "WP"],
    do_not_specialize_on_alignment=["stride_n", "stride_c", "stride_h", "stride_w"],
)
def prepare_8bit_kernel(
    x_ptr,
    lanes_ptr,  # float32 [3, 4]: factor, offset and border of each channel
    y_ptr,
    H,
    W,
    HP,  # rows and columns of y
    WP,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    PADDING: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    if EARLY:
        wait_for_inputs()
    row = tl.program_id(0)  # counted over all images
    image = (row // HP).to(tl.int64)
    h = row % HP - PADDING
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    offs_c = tl.arange(0, 4)
    w = offs_w - PADDING
    inside = (h >= 0) & (h < H) & ((w >= 0) & (w < W))[:, None] & (offs_c < 3)[None, :]  # [BLOCK_W, 4]
    x_offs = w[:, None] * stride_w + offs_c[None, :] * stride_c
    x = tl.load(x_ptr + image * stride_n + h * stride_h + x_offs, mask=inside, other=0).to(tl.float32)
    factor = tl.load(lanes_ptr + offs_c)
    offset = tl.load(lanes_ptr + 4 + offs_c)
    border = tl.load(lanes_ptr + 8 + offs_c)
    x = tl.where(inside, x * factor[None, :] + offset[None, :], border[None, :])
    y_offs = (row.to(tl.int64) * WP + offs_w)[:, None] * 4 + offs_c[None, :]
    mask_y = (offs_w < WP)[:, None] & (offs_c < 4)[None, :]
    if y_ptr.dtype.element_ty == tl.int8:
        tl.store(y_ptr + y_offs, signed(rounded(x, 0, tl.uint8)), mask=mask_y)
    else:
        tl.store(y_ptr + y_offs, rounded(x, 0, tl.float8e4nv), mask=mask_y)


@triton.jit
def _sums(x_ptr, w, offs_tap, row, offs_q, P, Q, stride_h, STRIDE: tl.constexpr, LEAST: tl.constexpr):
    """The sums of a row of the convolution at columns ``offs_q``, [BLOCK_Q, BLOCK_K]; ``LEAST`` outside the output."""
    offs_h = tl.minimum(tl.maximum(row, 0), P - 1) * STRIDE * stride_h
    offs_w = tl.minimum(tl.maximum(offs_q, 0), Q - 1) * (STRIDE * 4)
    x = tl.load(x_ptr + offs_h + (offs_w[:, None] + offs_tap[None, :]))  # [BLOCK_Q, R · J]
    sums = tl.dot(x, w, out_dtype=tl.int32 if w.dtype == tl.int8 else tl.float32)
    inside = (offs_q >= 0) & (offs_q < Q) & (row >= 0) & (row < P)
    return tl.where(inside[:, None], sums, LEAST)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["P", "Q", "POOL_P", "POOL_Q", "row_blocks", "column_blocks", "stride_n", "stride_h"])
def stem_8bit_kernel(
    x_ptr,  # prepared images
    w_ptr,
    weight_scale_ptr,
    bias_ptr,
    compensation_ptr,  # int32, 128 · Σ w of each output channel; not for e4m3
    y_ptr,
    x_scale,
    inverse,  # 1 / output_scale
    P,  # convolution output
    Q,
    POOL_P,  # pooled output; P and Q without pooling
    POOL_Q,
    row_blocks,
    column_blocks,
    stride_n,  # in units of 16 bytes, so that the compiler sees that rows are aligned
    stride_h,
    K: tl.constexpr,
    R: tl.constexpr,  # rows of the packed filter
    J: tl.constexpr,
    STRIDE: tl.constexpr,
    POOL: tl.constexpr,
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    INTEGER: tl.constexpr = w_ptr.dtype.element_ty == tl.int8
    LEAST: tl.constexpr = -(1 << 31) if INTEGER else float("-inf")
    if EARLY:
        wait_for_inputs()
    pid = tl.program_id(0)
    column_block = pid % column_blocks
    row_block = (pid // column_blocks) % row_blocks
    image = (pid // (column_blocks * row_blocks)).to(tl.int64)
    stride_h *= 16
    x_ptr += image * stride_n * 16
    y_ptr += image * (POOL_P * POOL_Q * K)

    offs_q = column_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_k = tl.arange(0, BLOCK_K)
    offs_j = tl.arange(0, R * J)
    offs_tap = offs_j // J * stride_h + offs_j % J
    mask_k = offs_k < K
    mask_y = (offs_q < POOL_Q)[:, None] & mask_k[None, :]
    # Channels past K read the last channel's weights and are not stored.
    w = tl.load(w_ptr + tl.minimum(offs_k, K - 1)[None, :] * (R * J) + offs_j[:, None])  # [R · J, BLOCK_K]
    scale = tl.load(weight_scale_ptr + offs_k, mask=mask_k, other=1.0) * (x_scale * inverse)
    bias = tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0) * inverse
    if INTEGER:
        added = tl.load(compensation_ptr + offs_k, mask=mask_k, other=0)
    if POOL:
        highest = tl.full((BLOCK_Q, BLOCK_K), LEAST, tl.int32 if INTEGER else tl.float32)
        first = 0
    for i in range(ROWS):
        row = row_block * ROWS + i
        if POOL:
            # Windows of neighbouring pooled rows share a row: only the first window computes three.
            below = tl.full((BLOCK_Q, BLOCK_K), LEAST, highest.dtype)
            for tap in range(first, 9):
                sums = _sums(
                    x_ptr, w, offs_tap, 2 * row + (tap // 3 - 1), 2 * offs_q + (tap % 3 - 1), P, Q, stride_h,
                    STRIDE, LEAST,
                )  # fmt: skip
                highest = _larger(highest, sums)
                below = tl.where(tap < 6, below, _larger(below, sums))
            sums = highest
            highest = below
            first = 3
        else:
            sums = _sums(x_ptr, w, offs_tap, row, offs_q, P, Q, stride_h, STRIDE, LEAST)
        if INTEGER:
            sums += added[None, :]
        y = tl.maximum(sums.to(tl.float32) * scale[None, :] + bias[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)
        y_offs = (row * POOL_Q + offs_q)[:, None] * K + offs_k[None, :]
        tl.store(y_ptr + y_offs, rounded(y, 0, y_ptr.dtype.element_ty), mask=mask_y & (row < POOL_P))
        # The next images are copied over the shared memory through which a row was put together for its store, so all
        # threads must have read it.
        tl.debug_barrier()


def stem_config(q: int, p: int, n: int, gpu: Gpu) -> StemConfig:
    """Return the configuration for ``n`` images of ``p`` × ``q`` output pixels (pooled, with pooling).

    64 columns with 8 warps and 2 stages take at most 128 registers and 48 KiB on sm_90: two programs fit a
    multiprocessor. With fewer columns Hopper has no wgmma.
    """
    block_q = 64 if gpu.arch == "sm_90" else min(64, max(16, next_power_of_2(q)))
    warps = 8 if block_q == 64 and not gpu.is_amd else 4
    programs = {rows: n * cdiv(p, rows) * cdiv(q, block_q) for rows in (8, 4, 2, 1)}
    filling = [rows for rows, count in programs.items() if count >= gpu.multiprocessors]
    return StemConfig("stem_8bit", block_q, (filling or [1])[0], warps, 1 if gpu is INTERPRETER else 2, prepared=True)


def pack_stem_weight_8bit(weight: Tensor) -> Tensor:
    """Pack ``weight`` [K, R, S, 3], int8 or e4m3, as [K, R', J]: J is 4·S and R' is R, each a power of two."""
    k, r, s, c = weight.shape
    packed = torch.zeros(
        k, max(2, next_power_of_2(r)), max(16, next_power_of_2(s * LANES)), dtype=torch.uint8, device=weight.device
    )
    packed.unflatten(2, (-1, LANES))[:, :r, :s, :c] = weight.view(torch.uint8)  # torch cannot copy slices of e4m3
    return packed.view(weight.dtype)


def image_lanes(
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, device: torch.device, x_scale: float = 1.0
) -> Tensor:
    """Return what :func:`prepare_8bit` needs to know about pixels (first) and normalised images, float32 [2, 3, 4].

    ``x · factor + offset`` is a pixel for int8, and a normalised pixel / ``x_scale`` for e4m3; the rows are factor,
    offset and border. ``dtype`` is that of the weights.
    """
    pixels = [[1.0] * 3, [0.0] * 3, [float(round(255 * m)) for m in mean]]
    normalised = [[255 * s for s in std], [255 * m for m in mean], pixels[2]]
    if dtype == E4M3:
        offset = [-m / (s * x_scale) for m, s in zip(mean, std, strict=True)]
        pixels = [[1 / (255 * s * x_scale) for s in std], offset, [0.0] * 3]
        normalised = [[1 / x_scale] * 3, [0.0] * 3, [0.0] * 3]
    lanes = torch.zeros(2, 3, LANES, dtype=torch.float32, device=device)
    lanes[..., :CHANNELS] = torch.tensor([pixels, normalised], dtype=torch.float32, device=device)
    return lanes


def prepare_8bit(
    x: Tensor, dtype: torch.dtype, lanes: Tensor, *, padding: int, rows: int, columns: int, traceable: bool = False
) -> Tensor:
    """Prepare ``x`` [N, 3, H, W], uint8 pixels or normalised floats with any strides, for the stem.

    ``dtype`` is that of the weights: int8 gives pixels − 128, float8_e4m3fn normalised pixels / x_scale. Returns a new
    tensor [N, ``rows``, ``columns``, 4]. ``lanes`` comes from :func:`image_lanes`. Arguments are not checked here.
    """
    n, _, h, w = x.shape
    y = x.new_empty(n, rows, columns, LANES, dtype=dtype)
    with device_guard(x.device):
        launchable(prepare_8bit_kernel, traceable)[(n * rows, cdiv(columns, BLOCK_W))](
            x,
            lanes[0 if x.dtype == torch.uint8 else 1],
            y,
            h,
            w,
            rows,
            columns,
            *x.stride(),
            PADDING=padding,
            **start_options(),
            BLOCK_W=BLOCK_W,
            num_warps=4,
        )
    return y


def stem_8bit_constants(weight: Tensor, config: StemConfig, *, stride: int, pool: bool) -> dict[str, Any]:
    """Return the stem's compile-time arguments except EARLY, for a launch or an ahead-of-time compilation."""
    k, r, j = weight.shape
    return {
        "K": k,
        "R": r,
        "J": j,
        "STRIDE": stride,
        "POOL": pool,
        "ROWS": config.rows,
        "BLOCK_Q": config.block_q,
        "BLOCK_K": max(16, next_power_of_2(k)),
    }


def stem_8bit_into(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    lanes: Tensor,
    *,
    filter_size: int,
    stride: int,
    padding: int,
    pool: bool,
    x_scale: float = 1.0,
    output_scale: float = 1.0,
    config: StemConfig | None = None,
    added: Tensor | None = None,
    traceable: bool = False,
) -> None:
    """Write the stem of ``x`` into ``y``; ``config`` overrides :func:`stem_config`.

    ``x`` [N, 3, H, W] with any strides, uint8 or floating point; ``weight`` [K, R', J] from
    :func:`pack_stem_weight_8bit` of a square filter of ``filter_size``; ``weight_scale``, positive, and ``bias``
    float32 [K]; ``lanes`` from :func:`image_lanes`; ``y`` [N, P, Q, K] contiguous: uint8 for int8 weights, e4m3 for
    e4m3, or float32, which is not rounded. ``added`` is :func:`.conv_8bit.compensation` of ``weight``; without it, it
    is computed. Arguments are not checked here; :func:`stem_8bit` checks them.
    """
    n, _, h, w = x.shape
    p, q, out_p, out_q = stem_output_sizes(h, w, filter_size, stride, padding, pool)
    if config is None:
        config = stem_config(out_q, out_p, n, gpu_of(x.device))
    _, packed_rows, j = weight.shape
    rows, columns = prepared_size(h, w, padding, j // LANES)
    rows += packed_rows - filter_size  # the last filter position reads the rows whose weights are zero, too
    x = prepare_8bit(x, weight.dtype, lanes, padding=padding, rows=rows, columns=columns, traceable=traceable)
    row_blocks, column_blocks = cdiv(out_p, config.rows), cdiv(out_q, config.block_q)
    with device_guard(x.device):
        launchable(stem_8bit_kernel, traceable)[(n * row_blocks * column_blocks,)](
            x,
            weight,
            weight_scale,
            bias,
            compensation(weight) if added is None else added,
            y,
            x_scale,
            1 / output_scale,
            p,
            q,
            out_p,
            out_q,
            row_blocks,
            column_blocks,
            x.stride(0) // ALIGNED,
            x.stride(1) // ALIGNED,
            **stem_8bit_constants(weight, config, stride=stride, pool=pool),
            **start_options(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


@kernel_op("stem_8bit", mutates_args=())
def stem_8bit(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    lanes: Tensor,
    filter_size: int,
    stride: int,
    padding: int,
    pool: bool,
    x_scale: float = 1.0,
    output_scale: float | None = None,
) -> Tensor:
    """Run the stem as the registered op ``torch.ops.fastres.stem_8bit``; shapes as in :func:`stem_8bit_into`.

    Returns a new tensor [N, P, Q, K]: uint8 for int8 weights, e4m3 for e4m3, float32 without ``output_scale``. Raises
    ``KernelError``, ``DtypeError`` or ``DeviceError``.
    """
    op = "fastres::stem_8bit"
    check_tensors(op, x.device, weight=weight, weight_scale=weight_scale, bias=bias, lanes=lanes)
    check_dtype(op, "x", x, torch.uint8, *ACTIVATION_DTYPES)
    check_dtype(op, "weight", weight, torch.int8, E4M3)
    n, c, h, w = x.shape
    k, *_ = weight.shape
    if c != CHANNELS:
        raise KernelError(f"{op}: x is {list(x.shape)} and must have {CHANNELS} channels")
    if c * h * w >= INT32_ELEMENTS:
        raise KernelError(f"{op}: an image of {h}×{w} has 2³¹ elements or more; resize it")
    for name, tensor in (("weight_scale", weight_scale), ("bias", bias)):
        check_dtype(op, name, tensor, torch.float32)
        check_shape(op, name, tensor, (k,))
    check_shape(op, "lanes", lanes, (2, 3, LANES))
    dtype = LEVELS if weight.dtype == torch.int8 else E4M3
    if reason := why_not_8bit(dtype, gpu_of(x.device)):
        raise KernelError(f"{op}: {reason}")
    *_, p, q = stem_output_sizes(h, w, filter_size, stride, padding, pool)
    y = weight.new_empty(n, max(p, 0), max(q, 0), k, dtype=torch.float32 if output_scale is None else dtype)
    if y.numel():
        stem_8bit_into(
            y, x, weight, weight_scale, bias, lanes, filter_size=filter_size, stride=stride, padding=padding, pool=pool,
            x_scale=x_scale, output_scale=1.0 if output_scale is None else output_scale, traceable=True,
        )  # fmt: skip
    return y
