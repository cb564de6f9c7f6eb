"""Window pools that halve an image, rounded up: ResNet's 3×3/2 maximum and ResNet-D's 2×2/2 average.

    max:      y[n, p, q, c] = max over r, s in 0…2 of x[n, 2p + r − 1, 2q + s − 1, c]
    average:  y[n, p, q, c] = mean over r, s in 0…1 of x[n, 2p + r, 2q + s, c]

over the pixels inside the image only; P = ⌈H / 2⌉, Q = ⌈W / 2⌉. ``x`` and ``y`` are NHWC. The average is summed in
float32. Each program computes one tile, output pixels × channels, of one image.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastres.errors import KernelError
from fastres.kernels.routing.rules import PoolConfig, route_window_pool

from .launch import (
    ACTIVATION_DTYPES,
    INT32_ELEMENTS,
    cdiv,
    check_dtype,
    check_tensors,
    device_guard,
    kernel_op,
    launchable,
    start_options,
    wait_for_inputs,
)

WINDOWS = {"max": (3, 1), "average": (2, 0)}  # mode → window size and padding


@triton.jit
def pixels_and_channels(pixel_blocks, C: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the image, the pixels [BLOCK_PIXELS] and the channels [BLOCK_C] of this program's tile."""
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    pixel_block = (pid // C_BLOCKS) % pixel_blocks
    image = (pid // (C_BLOCKS * pixel_blocks)).to(tl.int64)
    offs_c = (pid % C_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_pixels = pixel_block * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    return image, offs_pixels, offs_c


def launch_over_pixels(
    kernel: Any, x: Tensor, pixels: int, config: PoolConfig, *arguments: Any, traceable: bool, **constants: Any
) -> None:
    """Launch ``kernel`` over ``pixels`` of each image of ``x`` [N, H, W, C], a tile of pixels × channels a program.

    The kernel takes the ``arguments``, then the number of tiles along the pixels, then the ``constants``.
    """
    blocks = cdiv(pixels, config.block_hw)
    grid = (x.shape[0] * blocks * cdiv(x.shape[3], config.block_c),)
    with device_guard(x.device):
        launchable(kernel, traceable)[grid](
            *arguments, blocks, **constants, **start_options(), num_warps=config.num_warps
        )


@triton.jit(do_not_specialize=["H", "W", "P", "Q", "pixel_blocks"])
def window_pool_kernel(
    x_ptr,
    y_ptr,
    H,
    W,
    P,
    Q,
    pixel_blocks,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDING: tl.constexpr,
    MAXIMUM: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_PQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if EARLY:
        wait_for_inputs()
    image, offs_pq, offs_c = pixels_and_channels(pixel_blocks, C, BLOCK_PQ, BLOCK_C)
    p, q = offs_pq // Q, offs_pq % Q
    mask_pq = offs_pq < P * Q
    mask_c = offs_c < C
    x_ptr += image * H * W * C
    if MAXIMUM:
        acc = tl.full((BLOCK_PQ, BLOCK_C), float("-inf"), tl.float32)
    else:
        acc = tl.zeros((BLOCK_PQ, BLOCK_C), tl.float32)
    for r in tl.static_range(WINDOW):
        for s in tl.static_range(WINDOW):
            h, w = 2 * p - PADDING + r, 2 * q - PADDING + s
            inside = mask_pq & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            offs = (h * W + w)[:, None] * C + offs_c[None, :]  # [BLOCK_PQ, BLOCK_C]
            x = tl.load(
                x_ptr + offs, mask=inside[:, None] & mask_c[None, :], other=float("-inf") if MAXIMUM else 0.0
            ).to(tl.float32)
            if MAXIMUM:
                acc = tl.maximum(acc, x, propagate_nan=tl.PropagateNan.ALL)
            else:
                acc += x
    if not MAXIMUM:
        rows = tl.minimum(WINDOW, H - 2 * p)
        columns = tl.minimum(WINDOW, W - 2 * q)
        acc = acc / (rows * columns).to(tl.float32)[:, None]
    y_offs = offs_pq[:, None] * C + offs_c[None, :]
    mask = mask_pq[:, None] & mask_c[None, :]
    tl.store(y_ptr + image * P * Q * C + y_offs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def window_pool_constants(channels: int, mode: str, config: PoolConfig) -> dict[str, int | bool]:
    """Return the compile-time arguments, the same for a launch and for an ahead-of-time compilation."""
    window, padding = WINDOWS[mode]
    return {
        "C": channels,
        "WINDOW": window,
        "PADDING": padding,
        "MAXIMUM": mode == "max",
        "BLOCK_PQ": config.block_hw,
        "BLOCK_C": config.block_c,
    }


def window_pool_into(
    y: Tensor, x: Tensor, *, mode: str, config: PoolConfig | None = None, traceable: bool = False
) -> None:
    """Write the ``"max"`` or ``"average"`` pool of ``x`` [N, H, W, C] into ``y`` [N, ⌈H/2⌉, ⌈W/2⌉, C].

    Both are contiguous and have one dtype; an image has fewer than 2³¹ elements. ``config`` overrides the routing.
    """
    _, h, w, c = x.shape
    p, q = y.shape[1:3]
    if config is None:
        config = route_window_pool(c)
    constants = window_pool_constants(c, mode, config)
    launch_over_pixels(window_pool_kernel, x, p * q, config, x, y, h, w, p, q, traceable=traceable, **constants)


@kernel_op("window_pool", mutates_args=())
def window_pool(x: Tensor, mode: str) -> Tensor:
    """Run the pool as ``torch.ops.fastres.window_pool``: [N, H, W, C] to [N, ⌈H/2⌉, ⌈W/2⌉, C] of the same dtype.

    Raises ``KernelError``, ``DtypeError``, ``DeviceError``.
    """
    op = "fastres::window_pool"
    check_tensors(op, x.device, x=x)
    check_dtype(op, "x", x, *ACTIVATION_DTYPES)
    if mode not in WINDOWS:
        raise KernelError(f"{op}: mode is {mode!r} and must be {' or '.join(map(repr, WINDOWS))}")
    n, h, w, c = x.shape
    if h * w * c >= INT32_ELEMENTS:
        raise KernelError(f"{op}: an image of {h}×{w}×{c} has 2³¹ elements or more")
    y = x.new_empty(n, (h + 1) // 2, (w + 1) // 2, c)
    if y.numel():
        window_pool_into(y, x, mode=mode, traceable=True)
    return y
