"""Prepare images for the stem's fastest loads: normalised, padded with zeros, four channels per pixel.

    y[n, h, w, c] = v[n, c, h − padding, w − padding],  0 outside the image and in the fourth channel

v is the input itself (floating point) or ``x · scale[c] + shift[c]`` (uint8 pixels). The input has three channels in
any memory layout: its strides are arguments. Rows of y are a multiple of 4 pixels long, so that each is aligned to 16
bytes, and long enough for the taps of the last filter position. Each pixel is read once and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, device_guard, launchable, start_options, wait_for_inputs

ALIGNED = 16  # elements: rows of prepared images are multiples of this
BLOCK_W = 256


@triton.jit(
    do_not_specialize=["H", "W", "HP", "WP"],
    do_not_specialize_on_alignment=["stride_n", "stride_c", "stride_h", "stride_w"],
)
def prepare_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
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
    NORMALISE: tl.constexpr,
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
    x = tl.load(x_ptr + image * stride_n + h * stride_h + x_offs, mask=inside, other=0)
    if NORMALISE:
        scale = tl.load(scale_ptr + offs_c)
        shift = tl.load(shift_ptr + offs_c)
        x = tl.where(inside, x.to(tl.float32) * scale[None, :] + shift[None, :], 0.0)
    y_offs = (row.to(tl.int64) * WP + offs_w)[:, None] * 4 + offs_c[None, :]
    tl.store(y_ptr + y_offs, x.to(y_ptr.dtype.element_ty), mask=(offs_w < WP)[:, None] & (offs_c < 4)[None, :])


def prepared_size(h: int, w: int, padding: int, taps: int) -> tuple[int, int]:
    """Return the rows and columns of prepared images of ``h`` × ``w``.

    They are read ``taps`` columns at a time, and up to two rows at a time: the number of rows is even.
    """
    return cdiv(h + 2 * padding, 2) * 2, cdiv(w + padding + max(padding, taps - padding), 4) * 4


def prepare(
    x: Tensor,
    dtype: torch.dtype,
    scale: Tensor,
    shift: Tensor,
    *,
    padding: int,
    taps: int,
    traceable: bool = False,
) -> Tensor:
    """Prepare ``x`` [N, 3, H, W], uint8 pixels or floats with any strides.

    ``scale`` and ``shift`` float32 [4 or more] normalise pixels; ``taps`` is the number of columns that a load of the
    stem covers. Returns a new tensor [N, H', W', 4] of ``dtype`` (:func:`prepared_size`). Arguments are not checked
    here; :func:`fastres.kernels.stem.stem` checks them.
    """
    n, _, h, w = x.shape
    rows, columns = prepared_size(h, w, padding, taps)
    y = x.new_empty(n, rows, columns, 4, dtype=dtype)
    with device_guard(x.device):
        launchable(prepare_kernel, traceable)[(n * rows, cdiv(columns, BLOCK_W))](
            x,
            scale,
            shift,
            y,
            h,
            w,
            rows,
            columns,
            *x.stride(),
            PADDING=padding,
            NORMALISE=x.dtype == torch.uint8,
            **start_options(),
            BLOCK_W=BLOCK_W,
            num_warps=4,
        )
    return y
