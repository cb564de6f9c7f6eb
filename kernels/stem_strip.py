"""The stem of ImageNet networks in one pass over the image: each row of prepared images is loaded once.

    z[n, p, q, k] = bias[k] + Σ_{r, s, c} v[n, 2p + r − 3, 2q + s − 3, c] · w[k, r, s, c],  7×7 taps
    y[n, i, j, k] = max(0, max over the 3×3 window of z centred at (2i, 2j))

``stem.py`` computes one convolution row after the other and loads seven rows of the image for each. Here a program
walks down a strip of pooled rows, four rows of the image at a time, and adds their products to all five convolution
rows that need them: two are then complete, three are carried on. The weights stay in shared memory. Adding the bias and
clamping at 0 never change which value is largest, so both follow the pool.

A tile's rows are convolution columns. Their order puts an even column and the odd one to its right into one thread's
registers (rows m and m + 8 of the accumulator), so two of a window's three columns meet without an exchange. The third
is the pair to the left's odd column.

A convolution row or column outside the output repeats one that is in the same window. Rows of a strip's first two
steps, which began before the strip, are incomplete and are dropped.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels.routing.rules import StemConfig

from .launch import cdiv, device_guard, dot_upcast, launchable, next_power_of_2, start_options, wait_for_inputs
from .prepare import ALIGNED


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _add_product(acc, x, w, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(x.to(tl.float32), w.to(tl.float32), acc)
    return tl.dot(x, w, acc)


@triton.jit(
    do_not_specialize=["rows", "HP", "P", "Q", "POOL_P", "POOL_Q", "row_blocks", "column_blocks"],
    do_not_specialize_on_alignment=["stride_n", "stride_h"],
)
def stem_strip_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    rows,  # pooled rows of a strip
    HP,  # rows of x, an even number
    P,  # convolution output
    Q,
    POOL_P,  # pooled output
    POOL_Q,
    row_blocks,
    column_blocks,
    stride_n,  # in units of 16 elements (ALIGNED): the compiler sees that loads are aligned
    stride_h,
    K: tl.constexpr,
    J: tl.constexpr,
    UPCAST: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if EARLY:
        wait_for_inputs()
    pid = tl.program_id(0)
    column_block = pid % column_blocks
    row_block = (pid // column_blocks) % row_blocks
    image = (pid // (column_blocks * row_blocks)).to(tl.int64)
    stride_h *= 16
    x_ptr += image * (stride_n * 16)
    y_ptr += image * (POOL_P * POOL_Q * K)
    Y = y_ptr.dtype.element_ty

    # Pooled column i is the largest of convolution columns 2i − 1, 2i and 2i + 1. The first pooled column of a program
    # only serves its right neighbour.
    HALF: tl.constexpr = BLOCK_Q // 2
    first = column_block * (HALF - 1) - 1
    m = tl.arange(0, BLOCK_Q)
    q = 2 * (first + m // 16 * 8 + m % 8) + m // 8 % 2
    q = tl.minimum(tl.maximum(q, 0), Q - 1)
    offs_j = tl.arange(0, 2 * J)  # the taps and channels of two filter rows
    x_offs = (q * 8)[:, None] + (offs_j % J + offs_j // J * stride_h)[None, :]
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    w_offs = tl.minimum(offs_k, K - 1)[None, :] * (7 * J) + offs_j[:, None]
    w01 = tl.load(w_ptr + w_offs)
    w23 = tl.load(w_ptr + w_offs + 2 * J)
    w45 = tl.load(w_ptr + w_offs + 4 * J)
    w6 = tl.load(w_ptr + w_offs + 6 * J, mask=(offs_j < J)[:, None], other=0.0)  # there is no eighth filter row

    offs_i = tl.arange(0, HALF)
    pool_q = first + offs_i
    mask_pool = ((offs_i > 0) & (pool_q < POOL_Q))[:, None] & mask_k[None, :]
    y_offs = pool_q[:, None] * K + offs_k[None, :]
    to_the_left = tl.broadcast_to(tl.maximum(offs_i - 1, 0)[:, None], (HALF, BLOCK_K))

    zeros = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    above = zeros  # the odd convolution row above
    begun4 = zeros  # convolution rows to which the first 6, 4 and 2 filter rows have been added
    begun3 = zeros
    begun2 = zeros
    for i in range(-2, rows):
        pool_p = row_block * rows + i
        # The first row of the image that convolution row 2·pool_p has yet to see. Clamping changes dropped rows only.
        h = 4 * pool_p + 6
        x01 = tl.load(x_ptr + tl.minimum(tl.maximum(h, 0), HP - 2) * stride_h + x_offs)
        x23 = tl.load(x_ptr + tl.minimum(tl.maximum(h + 2, 0), HP - 2) * stride_h + x_offs)
        even = _add_product(begun4, x01, w6, UPCAST)
        highest = _larger(above, even)
        odd = _add_product(_add_product(begun3, x01, w45, UPCAST), x23, w6, UPCAST)
        row = 2 * pool_p + 1
        highest = tl.where(row < P, _larger(highest, odd), highest)
        above = tl.where(row > 0, odd, float("-inf"))
        if i >= 0:
            pairs = tl.permute(tl.reshape(highest, (HALF // 8, 2, 8, BLOCK_K)), (0, 2, 3, 1))
            evens, odds = tl.split(pairs)  # columns; no thread needs another's values
            odds = tl.reshape(odds, (HALF, BLOCK_K))
            both = _larger(tl.reshape(evens, (HALF, BLOCK_K)), odds)
            bias = tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0)  # here, because registers are scarce
            y = _larger(_larger(both, tl.gather(odds, to_the_left, 0)) + bias[None, :], 0.0)
            tl.store(y_ptr + pool_p.to(tl.int64) * (POOL_Q * K) + y_offs, y.to(Y), mask=mask_pool & (pool_p < POOL_P))
        # This order, too, saves registers: any other spills.
        begun4 = _add_product(_add_product(begun2, x01, w23, UPCAST), x23, w45, UPCAST)
        begun2 = _add_product(zeros, x23, w01, UPCAST)
        begun3 = _add_product(_add_product(zeros, x01, w01, UPCAST), x23, w23, UPCAST)


def stem_strip_constants(weight: Tensor, config: StemConfig) -> dict[str, Any]:
    """Return the kernel's compile-time arguments, for a launch or an ahead-of-time compilation."""
    k, _, j = weight.shape
    block_k = max(16, next_power_of_2(k))
    return {"K": k, "J": j, "UPCAST": dot_upcast(weight.dtype), "BLOCK_Q": config.block_q, "BLOCK_K": block_k}


def stem_strip_into(
    y: Tensor,
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    pixels: tuple[int, int],
    config: StemConfig,
    traceable: bool = False,
) -> None:
    """Write the stem of prepared ``images`` into ``y``.

    ``images`` [N, H', W', 4] from :func:`fastres.kernels.prepare.prepare` with 3 pixels of padding, ``weight``
    [K, 7, J] from :func:`fastres.kernels.stem.pack_stem_weight`, ``bias`` float32 [K], ``y`` [N, ⌈P/2⌉, ⌈Q/2⌉, K]
    contiguous; ``pixels`` is (P, Q), the convolution's output. All but ``bias`` share a dtype, float16 or bfloat16.
    Arguments are not checked here.
    """
    n, out_p, out_q, _ = y.shape
    row_blocks, column_blocks = cdiv(out_p, config.rows), cdiv(out_q, config.block_q // 2 - 1)
    with device_guard(images.device):
        launchable(stem_strip_kernel, traceable)[(n * row_blocks * column_blocks,)](
            images,
            weight,
            bias,
            y,
            config.rows,
            images.shape[1],
            *pixels,
            out_p,
            out_q,
            row_blocks,
            column_blocks,
            images.stride(0) // ALIGNED,
            images.stride(1) // ALIGNED,
            **stem_strip_constants(weight, config),
            **start_options(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
