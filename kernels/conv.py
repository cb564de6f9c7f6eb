"""Convolution + bias + residual + ReLU as one implicit GEMM.

    y[n, p, q, k] = relu(bias[k] + residual[n, p, q, k]
                         + Σ_{r, s, c} x[n, p·stride + r − padding, q·stride + s − padding, g·C + c] · w[k, r, s, c])

with g the group of output channel k and C the input channels of a group; x is zero outside the image. The GEMM has
M = N·P·Q rows (output pixels), K columns (output channels) and a reduction of R·S·C. Nothing is unfolded in memory:
each program computes BLOCK_M pixels × BLOCK_N channels and finds its input pixels by index arithmetic, in one flat loop
over (r, s, channel block), so the software pipeline fills and drains once.

With SPLIT > 1, that many programs share the reduction of one tile: a small batch has fewer tiles than the GPU has
multiprocessors. Each program writes its partial sum to a workspace and increments a counter. The last one to arrive
adds the partial sums in a fixed order, so that results do not depend on timing, and finishes the tile.

Activations are NHWC, weights KRSC, bias float32 [K]; accumulation is float32. Any N, H, W, R, S, stride, padding and
group size work. The kernel is least efficient if C is not a multiple of BLOCK_K.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.errors import KernelError
from fastres.kernels.routing.cards import gpu_of
from fastres.kernels.routing.rules import ConvConfig, ConvShape, route_conv

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
    needs_wide_offsets,
    start_options,
    wait_for_inputs,
)


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q"])
def conv_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    partial_ptr,  # float32 [tiles, SPLIT, BLOCK_M, BLOCK_N]
    arrived_ptr,  # int32 [tiles], zeros; left as zeros
    M,  # N · P · Q
    H,
    W,
    P,
    Q,
    C: tl.constexpr,  # input channels of a group
    K: tl.constexpr,  # output channels of a group
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets: some tensor has 2³¹ elements or more
    SPLIT: tl.constexpr,  # programs that share a tile's reduction
    PRECISION: tl.constexpr,  # of a float32 dot: "ieee" or "tf32"
    UPCAST: tl.constexpr,  # multiply in float32: the interpreter has no bfloat16 dot
    EARLY: tl.constexpr,  # the kernel may start before its inputs are ready (launch.early_launches)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    C_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    N_BLOCKS: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    MASK_C: tl.constexpr = C % BLOCK_K != 0
    MASK_N: tl.constexpr = K % BLOCK_N != 0

    # Programs that share input pixels (all channel blocks of one pixel block) run next to each other.
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = R * S * C_BLOCKS
    first = 0
    last = BLOCKS
    if SPLIT > 1:
        EACH: tl.constexpr = (BLOCKS + SPLIT - 1) // SPLIT
        first = (pid % SPLIT) * EACH
        last = tl.minimum(first + EACH, BLOCKS)
        split = pid % SPLIT
        pid = pid // SPLIT
    pid_n = pid % (N_BLOCKS * GROUPS)
    pid_m = pid // (N_BLOCKS * GROUPS)
    group = pid_n // N_BLOCKS
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid_n % N_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)

    offs_q = offs_m % Q
    offs_p = (offs_m // Q) % P
    offs_image = offs_m // (P * Q)
    if WIDE:
        offs_image = offs_image.to(tl.int64)
        offs_m = offs_m.to(tl.int64)
    top = offs_p * STRIDE - PADDING
    left = offs_q * STRIDE - PADDING
    x_offs = ((offs_image * H + top) * W + left)[:, None] * (C * GROUPS) + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    w_offs = offs_n[None, :] * (R * S * C) + offs_k[:, None]  # [BLOCK_K, BLOCK_N]
    x_ptr += group * C
    w_ptr += group * (K * R * S * C)
    top = tl.where(offs_m < M, top, -(1 << 24))  # rows past the end read nothing

    if EARLY:
        wait_for_inputs()
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(first, last):
        tap = block // C_BLOCKS
        c = (block % C_BLOCKS) * BLOCK_K
        r = tap // S
        s = tap % S
        # One unsigned comparison checks both ends of a range.
        inside = ((top + r).to(tl.uint32) < H) & ((left + s).to(tl.uint32) < W)
        mask_x = inside[:, None]
        if MASK_C:
            mask_x = mask_x & (c + offs_k < C)[None, :]
        x = tl.load(x_ptr + ((r * W + s) * (C * GROUPS) + c) + x_offs, mask=mask_x, other=0.0)
        if MASK_C and MASK_N:
            mask_w = (c + offs_k < C)[:, None] & (offs_n < K)[None, :]
            w = tl.load(w_ptr + (tap * C + c) + w_offs, mask=mask_w, other=0.0)
        elif MASK_C:
            w = tl.load(w_ptr + (tap * C + c) + w_offs, mask=(c + offs_k < C)[:, None], other=0.0)
        elif MASK_N:
            w = tl.load(w_ptr + (tap * C + c) + w_offs, mask=(offs_n < K)[None, :], other=0.0)
        else:
            w = tl.load(w_ptr + (tap * C + c) + w_offs)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    if SPLIT > 1:
        offs_tile = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        partial_ptr += pid.to(tl.int64) * (SPLIT * BLOCK_M * BLOCK_N)
        tl.store(partial_ptr + split * (BLOCK_M * BLOCK_N) + offs_tile, acc)
        tl.debug_barrier()  # the program's stores all finish before it counts itself as arrived
        if tl.atomic_add(arrived_ptr + pid, 1, sem="acq_rel") != SPLIT - 1:
            return
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for other in range(SPLIT):
            # Other multiprocessors wrote these: read them from L2.
            acc += tl.load(partial_ptr + other * (BLOCK_M * BLOCK_N) + offs_tile, cache_modifier=".cg")
        tl.store(arrived_ptr + pid, 0)

    offs_k_out = group * K + offs_n
    mask_y = (offs_m < M)[:, None]
    if MASK_N:
        mask_y = mask_y & (offs_n < K)[None, :]
        acc += tl.load(bias_ptr + offs_k_out, mask=offs_n < K, other=0.0)[None, :]
    else:
        acc += tl.load(bias_ptr + offs_k_out)[None, :]
    y_offs = offs_m[:, None] * (K * GROUPS) + offs_k_out[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + y_offs, mask=mask_y, other=0.0).to(tl.float32)
    if RELU:
        # Not tl.maximum alone: it would turn NaN into 0 and hide a broken input.
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + y_offs, acc.to(y_ptr.dtype.element_ty), mask=mask_y)


def conv_constants(
    shape: ConvShape,
    dtype: torch.dtype,
    config: ConvConfig,
    *,
    residual: bool,
    relu: bool,
    wide: bool = False,
    precision: str = "ieee",
) -> dict[str, Any]:
    """Return the compile-time arguments except EARLY, the same for a launch and for an ahead-of-time compilation."""
    return {
        "C": shape.C,
        "K": shape.K,
        "GROUPS": shape.groups,
        "R": shape.R,
        "S": shape.S,
        "STRIDE": shape.stride,
        "PADDING": shape.padding,
        "HAS_RESIDUAL": residual,
        "RELU": relu,
        "WIDE": wide,
        "SPLIT": config.split,
        "PRECISION": precision,
        "UPCAST": dot_upcast(dtype),
        **config.blocks,
    }


def conv_grid(shape: ConvShape, config: ConvConfig) -> tuple[int]:
    """Return the grid: ``config.split`` programs, usually one, per tile of output pixels × output channels."""
    return (conv_tiles(shape, config) * config.split,)


def conv_tiles(shape: ConvShape, config: ConvConfig) -> int:
    """Return the number of tiles in the output."""
    return cdiv(shape.M, config.block_m) * cdiv(shape.K, config.block_n) * shape.groups


def arrivals(shape: ConvShape, config: ConvConfig) -> int:
    """Return the number of counters a launch needs: one per tile if programs share tiles, else none."""
    return conv_tiles(shape, config) if config.split > 1 else 0


def conv_shape(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> ConvShape:
    """Return the sizes of a convolution of ``x`` [N, H, W, groups·C] with ``weight`` [groups·K, R, S, C]."""
    n, h, w, _ = x.shape
    k, r, s, c = weight.shape
    return ConvShape(n, h, w, c, k // groups, r, s, stride, padding, groups)


def conv2d_into(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    relu: bool = False,
    config: ConvConfig | None = None,
    arrived: Tensor | None = None,
    traceable: bool = False,
) -> None:
    """Write the convolution of ``x`` into ``y``; ``config`` overrides the routing.

    ``x`` [N, H, W, groups·C], ``weight`` [groups·K, R, S, C], ``bias`` float32 [groups·K], ``y`` and ``residual``
    [N, P, Q, groups·K]; all contiguous and on one device. ``x``, ``weight`` and ``residual`` share one dtype: float32,
    bfloat16 or float16. ``y`` has that dtype or float32. ``y`` may be the same tensor as ``residual``, but must not
    overlap any other tensor. ``arrived`` holds at least :func:`arrivals` int32 zeros; successive launches on one stream
    may share it. Without it, a launch that needs counters allocates its own. Raises ``KernelError``, ``DtypeError``,
    ``DeviceError``.
    """
    shape = conv_shape(x, weight, stride, padding, groups)
    if config is None:
        precision = float32_precision()
        config = route_conv(shape, x.dtype, gpu_of(x.device), precision, residual=residual is not None)
    constants = conv_constants(
        shape,
        x.dtype,
        config,
        residual=residual is not None,
        relu=relu,
        wide=needs_wide_offsets(x, y),
        precision=float32_precision(),
    )
    partial = None
    if config.split > 1:
        tiles, size = conv_tiles(shape, config), config.block_m * config.block_n
        partial = x.new_empty(tiles * config.split * size, dtype=torch.float32)
        arrived = x.new_zeros(tiles, dtype=torch.int32) if arrived is None else arrived
    with device_guard(x.device):
        launchable(conv_kernel, traceable)[conv_grid(shape, config)](
            x,
            weight,
            bias,
            residual,
            y,
            partial,
            arrived if config.split > 1 else None,
            shape.M,
            shape.H,
            shape.W,
            shape.P,
            shape.Q,
            **constants,
            **start_options(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def check_conv(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, shape: ConvShape) -> None:
    """Raise an error if :func:`conv2d_into` cannot take the tensors."""
    op = "fastres::conv2d"
    check_tensors(op, x.device, x=x, weight=weight, bias=bias, residual=residual, y=y)
    check_dtype(op, "x", x, *ACTIVATION_DTYPES)
    check_dtype(op, "weight", weight, x.dtype)
    check_dtype(op, "bias", bias, torch.float32)
    check_dtype(op, "y", y, x.dtype, torch.float32)
    check_shape(op, "weight", weight, (shape.K * shape.groups, shape.R, shape.S, shape.C))
    check_shape(op, "x", x, (shape.N, shape.H, shape.W, shape.C * shape.groups))
    if shape.P < 1 or shape.Q < 1:
        raise KernelError(f"{op}: a {shape.R}×{shape.S} filter does not fit images of {shape.H}×{shape.W}")
    check_shape(op, "bias", bias, (shape.K * shape.groups,))
    check_shape(op, "y", y, (shape.N, shape.P, shape.Q, shape.K * shape.groups))
    if residual is not None:
        check_dtype(op, "residual", residual, x.dtype)
        check_shape(op, "residual", residual, tuple(y.shape))
    if shape.M >= INT32_ELEMENTS - 256:
        raise KernelError(f"{op}: {shape.M} output pixels are more than 2³¹; split the batch")


@kernel_op("conv2d", mutates_args=())
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    """Run the convolution as the registered op ``torch.ops.fastres.conv2d``; shapes as in :func:`conv2d_into`.

    Returns a new tensor [N, P, Q, groups·K] of ``x``'s dtype.
    """
    shape = conv_shape(x, weight, stride, padding, groups)
    y = x.new_empty(shape.N, max(shape.P, 0), max(shape.Q, 0), weight.shape[0])
    check_conv(y, x, weight, bias, residual, shape)
    if y.numel():
        conv2d_into(
            y, x, weight, bias, residual, stride=stride, padding=padding, groups=groups, relu=relu, traceable=True
        )
    return y
