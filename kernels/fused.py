"""The later part of a bottleneck block in one kernel: 3×3, then 1×1 + shortcut, then the next block's first 1×1.

    v[n, p, q, j] = relu(b1[j] + Σ_{r, s, c} x[n, p·stride + r − padding, q·stride + s − padding, c] · w1[j, r, s, c])
    y[n, p, q, k] = relu(b2[k] + Σ_j v[n, p, q, j] · w2[k, j] + residual[n, p, q, k])
    z[n, p, q, i] = relu(b3[i] + Σ_k y[n, p, q, k] · w3[i, k])

v never leaves registers, and y is written once and not read again for z. In the first stages of a ResNet, where memory
is the limit, this saves a quarter to a third of the traffic. z is optional. A ``shortcut`` u with its projection may
replace the residual; the last term of y is then Σ_c u[n, p·t, q·t, c] · w2[k, J + c].

Tiles are those of ``conv_tma``: one output pixel of BLOCK_M images. All J channels of v are held at once. A second
pipelined loop walks over the K channels of y, BLOCK_N at a time. v and y are rounded to the activations' dtype before
they are multiplied, as if they had been stored.

Activations are NHWC in float16 or bfloat16, biases float32; accumulation is float32. J and the channels of z and u are
powers of two up to 128 (they are held whole), K is a multiple of 128, C of 8. The kernel needs a GPU of the sm_90
family.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.errors import KernelError
from fastres.kernels.routing.cards import Gpu, gpu_of
from fastres.kernels.routing.rules import ConvConfig, ConvShape

from .conv_tma import MIN_BATCH, describe
from .launch import cdiv, check_dtype, check_shape, check_tensors, device_guard, dot_upcast
from .tma import check_tma, why_not_tma

KERNELS = ("fused",)

# Most channels held whole in registers, a multiple of every BLOCK_N; fewest that a tensor-core instruction multiplies.
MOST_HELD, FEWEST_HELD = 128, 16

# Candidates to time, if they fit (``fused_fits``). BLOCK_N is the width of y computed at a time. Each comment gives the
# registers of 64→256→64 / 128→512→128 with a residual in Triton 3.7.1. Two programs of 8 warps fit a multiprocessor if
# they take at most 128. Triton 3.6.0 takes at most two more; only the last candidate spills, at J = 128.
CANDIDATES = (
    ConvConfig("fused", 128, 64, 64, 8, 3),  # 128 / 175
    ConvConfig("fused", 128, 64, 64, 8, 2),  # 126 / 173
    ConvConfig("fused", 64, 64, 64, 4, 3),  # 128 / 175
    ConvConfig("fused", 64, 64, 64, 4, 2),  # 126 / 176
    ConvConfig("fused", 128, 128, 64, 8, 2),  # 176 / 219
    ConvConfig("fused", 256, 64, 64, 8, 3),  # 220 / 255 and spills
)


@triton.jit(do_not_specialize=["N"])
def fused_kernel(
    x_desc,  # [H, W, N, C], boxes [1, 1, BLOCK_M, BLOCK_K]
    w1_desc,  # [J, R · S · C], boxes [J, BLOCK_K]
    w2_desc,  # [K, J + U], boxes [BLOCK_N, J]
    projection_desc,  # the same tensor, boxes [BLOCK_N, U]
    w3_desc,  # [NEXT, K], boxes [NEXT, BLOCK_N]
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    residual_desc,  # [P, Q, N, K], boxes [1, 1, BLOCK_M, BLOCK_N]
    u_desc,  # [H', W', N, U], boxes [1, 1, BLOCK_M, U]
    y_desc,  # like residual_desc
    z_desc,  # [P, Q, N, NEXT], boxes [1, 1, BLOCK_M, NEXT]
    N,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,
    U: tl.constexpr,  # 0: a residual instead of a shortcut
    NEXT: tl.constexpr,  # 0: no z
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SHORTCUT_STRIDE: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32: the interpreter has no bfloat16 dot
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    C_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    # All pixels of one block of images come before the next block: neighbours share input pixels and run together.
    pixel = tl.program_id(0)
    q = pixel % Q
    p = (pixel // Q) % P
    image = (pixel // (P * Q)) * BLOCK_M

    # The 3×3 convolution, over the taps inside the image: from row r0 and column s0 on.
    top = p * STRIDE - PADDING
    left = q * STRIDE - PADDING
    r0 = tl.maximum(-top, 0)
    s0 = tl.maximum(-left, 0)
    s_count = tl.minimum(W - left, S) - s0
    blocks = (tl.minimum(H - top, R) - r0) * s_count * C_BLOCKS
    acc = tl.zeros((BLOCK_M, J), tl.float32)
    for block in range(blocks):
        tap = block // C_BLOCKS
        c = (block % C_BLOCKS) * BLOCK_K
        r = r0 + tap // s_count
        s = s0 + tap % s_count
        x = x_desc.load([top + r, left + s, image, c]).reshape(BLOCK_M, BLOCK_K)
        w = w1_desc.load([0, (r * S + s) * C + c])
        acc = _dot(x, w, acc, UPCAST)
    v = acc + tl.load(bias1_ptr + tl.arange(0, J))[None, :]
    v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL).to(y_desc.dtype)

    # The 1×1 convolutions, BLOCK_N channels of y at a time. Loads run an iteration ahead with 3 stages, hardly with 2.
    z = tl.zeros((BLOCK_M, NEXT if NEXT > 0 else 16), tl.float32)
    for k in range(0, K, BLOCK_N):
        y = _dot(v, w2_desc.load([k, 0]), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), UPCAST)
        if U > 0:
            u = u_desc.load([p * SHORTCUT_STRIDE, q * SHORTCUT_STRIDE, image, 0]).reshape(BLOCK_M, U)
            y = _dot(u, projection_desc.load([k, J]), y, UPCAST)
        else:
            y += residual_desc.load([p, q, image, k]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
        y += tl.load(bias2_ptr + k + tl.arange(0, BLOCK_N))[None, :]
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL).to(y_desc.dtype)
        y_desc.store([p, q, image, k], y.reshape(1, 1, BLOCK_M, BLOCK_N))
        if NEXT > 0:
            z = _dot(y, w3_desc.load([0, k]), z, UPCAST)
    if NEXT > 0:
        z += tl.load(bias3_ptr + tl.arange(0, NEXT))[None, :]
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        z_desc.store([p, q, image, 0], z.to(z_desc.dtype).reshape(1, 1, BLOCK_M, NEXT))


@triton.jit
def _dot(a, w, acc, UPCAST: tl.constexpr):
    """acc + a [rows, reduction] · wᵀ [columns, reduction]."""
    if UPCAST:
        a = a.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(a, w.T, acc)


def fused_constants(
    shape: ConvShape,
    k: int,
    dtype: torch.dtype,
    config: ConvConfig,
    *,
    shortcut_channels: int = 0,
    shortcut_stride: int = 1,
    next_channels: int = 0,
) -> dict[str, Any]:
    """Return the kernel's compile-time arguments. Launches and ahead-of-time compilations must agree on them.

    ``shape`` is that of the 3×3 convolution; ``k`` is the number of y's channels.
    """
    return {
        **shape.constants,
        "J": shape.K,
        "K": k,
        "U": shortcut_channels,
        "NEXT": next_channels,
        "SHORTCUT_STRIDE": shortcut_stride,
        "UPCAST": dot_upcast(dtype),
        **config.blocks,
    }


def fused_boxes(
    shape: ConvShape, config: ConvConfig, *, shortcut_channels: int = 0, next_channels: int = 0
) -> dict[str, list[int]]:
    """Return the box that each descriptor in use moves, by kernel argument."""
    pixel = [1, 1, config.block_m]
    boxes = {
        "x_desc": [*pixel, config.block_k],
        "w1_desc": [shape.K, config.block_k],
        "w2_desc": [config.block_n, shape.K],
        "y_desc": [*pixel, config.block_n],
    }
    if shortcut_channels:
        boxes |= {"projection_desc": [config.block_n, shortcut_channels], "u_desc": [*pixel, shortcut_channels]}
    else:
        boxes["residual_desc"] = [*pixel, config.block_n]
    if next_channels:
        boxes |= {"w3_desc": [next_channels, config.block_n], "z_desc": [*pixel, next_channels]}
    return boxes


def fused_grid(shape: ConvShape, config: ConvConfig) -> tuple[int]:
    """Return the grid: one program per output pixel of each block of images."""
    return (cdiv(shape.N, config.block_m) * shape.P * shape.Q,)


def fused_shared_memory(
    shape: ConvShape, config: ConvConfig, *, shortcut_channels: int = 0, next_channels: int = 0
) -> int:
    """Return an upper bound of the bytes of shared memory that a program needs."""
    m, n, j, u = config.block_m, config.block_n, shape.K, shortcut_channels
    first = config.num_stages * (m + j) * config.block_k
    added = (m + n) * u if u else m * n
    second = config.num_stages * (n * j + added + next_channels * n) + m * n
    return 2 * max(first, second) + 2048


def fused_fits(
    shape: ConvShape, config: ConvConfig, gpu: Gpu, *, shortcut_channels: int = 0, next_channels: int = 0
) -> bool:
    """Return True if ``gpu`` has the shared memory for a program and the registers for its two accumulators."""
    need = fused_shared_memory(shape, config, shortcut_channels=shortcut_channels, next_channels=next_channels)
    held = config.block_m * (shape.K + next_channels) / (32 * config.num_warps)
    return need <= gpu.shared_memory and held <= 128


def why_not_fused(
    shape: ConvShape, k: int, dtype: torch.dtype, gpu: Gpu, *, shortcut_channels: int = 0, next_channels: int = 0
) -> str:
    """Return why this kernel cannot, or should not, take a block; empty if it can.

    ``shape`` is that of the 3×3 convolution.
    """
    held = [channels for channels in (shape.K, shortcut_channels, next_channels) if channels]
    if bad := [n for n in held if n & (n - 1) or not FEWEST_HELD <= n <= MOST_HELD]:
        known = f"a power of two from {FEWEST_HELD} to {MOST_HELD}"
        return f"the channel counts of the 3×3, the shortcut and the next 1×1 must each be {known}, not {bad[0]}"
    if k % MOST_HELD:
        return f"the block's {k} output channels are not a multiple of {MOST_HELD}"
    if shape.groups != 1:
        return "the fused kernel takes no groups"
    if shape.padding >= min(shape.R, shape.S):
        return f"padding {shape.padding} must be smaller than the {shape.R}×{shape.S} filter"
    if shape.N < MIN_BATCH:
        return f"the fused kernel takes batches of {MIN_BATCH} images or more, not {shape.N}"
    return why_not_tma(dtype, gpu, shape.C)


def fused_into(
    y: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 1,
    shortcut_stride: int = 1,
    z: Tensor | None = None,
    weight3: Tensor | None = None,
    bias3: Tensor | None = None,
    config: ConvConfig,
) -> None:
    """Write the block's output into ``y`` and, if ``z`` is given, the next block's first convolution into ``z``.

    ``x`` [N, H, W, C], ``weight1`` [J, R, S, C], ``weight2`` [K, J + U] (``tma.merge_shortcut_weight``; U is 0 without
    a shortcut), ``weight3`` [I, K], biases float32; ``y`` and ``residual`` [N, P, Q, K], ``z`` [N, P, Q, I],
    ``shortcut`` [N, H', W', U], read at multiples of ``shortcut_stride``. Give either a residual or a shortcut, and all
    or none of ``z``, ``weight3`` and ``bias3``. All are contiguous, on one device and aligned to 16 bytes; all but the
    biases share a dtype, float16 or bfloat16. ``y`` may be the same tensor as ``residual``, but no other output may
    overlap an input. Arguments are not checked here; :func:`check_fused` checks them.
    """
    shape = fused_shape(x, weight1, stride, padding)
    k = weight2.shape[0]
    u = 0 if shortcut is None else shortcut.shape[3]
    next_channels = 0 if z is None else z.shape[3]
    tensors = {
        "x_desc": x,
        "w1_desc": weight1.view(shape.K, -1),
        "w2_desc": weight2,
        "projection_desc": weight2,
        "w3_desc": weight3,
        "residual_desc": residual,
        "u_desc": shortcut,
        "y_desc": y,
        "z_desc": z,
    }
    descriptors: dict[str, TensorDescriptor | None] = dict.fromkeys(tensors)
    for name, box in fused_boxes(shape, config, shortcut_channels=u, next_channels=next_channels).items():
        tensor = tensors[name]
        assert tensor is not None, name
        descriptors[name] = describe(tensor, box) if len(box) == 4 else TensorDescriptor.from_tensor(tensor, box)
    constants = fused_constants(
        shape, k, x.dtype, config, shortcut_channels=u, shortcut_stride=shortcut_stride, next_channels=next_channels
    )
    with device_guard(x.device):
        fused_kernel[fused_grid(shape, config)](
            **descriptors,
            bias1_ptr=bias1,
            bias2_ptr=bias2,
            bias3_ptr=bias3,
            N=shape.N,
            **constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def fused_shape(x: Tensor, weight1: Tensor, stride: int, padding: int) -> ConvShape:
    """Return the sizes of the 3×3 convolution of ``x`` [N, H, W, C] with ``weight1`` [J, R, S, C]."""
    n, h, w, c = x.shape
    j, r, s, _ = weight1.shape
    return ConvShape(n, h, w, c, j, r, s, stride, padding)


def check_fused(
    y: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 1,
    shortcut_stride: int = 1,
    z: Tensor | None = None,
    weight3: Tensor | None = None,
    bias3: Tensor | None = None,
) -> None:
    """Raise ``KernelError``, ``DtypeError`` or ``DeviceError`` if :func:`fused_into` does not take the tensors."""
    op = "fastres::fused"
    biases = {"bias1": bias1, "bias2": bias2, "bias3": bias3}
    others = {
        "weight1": weight1, "weight2": weight2, "weight3": weight3, "residual": residual, "shortcut": shortcut, "y": y,
        "z": z,
    }  # fmt: skip
    check_tensors(op, x.device, x=x, **others, **biases)
    check_tma(op, gpu_of(x.device), x, **others)
    check_dtype(op, "y", y, x.dtype)
    if (residual is None) == (shortcut is None):
        raise KernelError(
            f"{op} takes either a residual or a shortcut; {'neither was' if residual is None else 'both were'} given"
        )
    if len({part is None for part in (z, weight3, bias3)}) > 1:
        raise KernelError(f"{op}: z, weight3 and bias3 go together; give all or none")
    shape = fused_shape(x, weight1, stride, padding)
    k, u = weight2.shape[0], 0 if shortcut is None else shortcut.shape[-1]
    channels = 0 if z is None else z.shape[-1]
    big_enough = replace(shape, N=max(shape.N, MIN_BATCH))
    gpu = gpu_of(x.device)
    if reason := why_not_fused(big_enough, k, x.dtype, gpu, shortcut_channels=u, next_channels=channels):
        raise KernelError(f"{op}: {reason}")
    pixels = (shape.N, shape.P, shape.Q)
    check_shape(op, "weight1", weight1, (shape.K, shape.R, shape.S, shape.C))
    check_shape(op, "weight2", weight2, (k, shape.K + u))
    check_shape(op, "y", y, (*pixels, k))
    wanted = {"bias1": shape.K, "bias2": k, "bias3": channels}
    for name, bias in biases.items():
        if bias is not None:
            check_dtype(op, name, bias, torch.float32)
            check_shape(op, name, bias, (wanted[name],))
    if residual is not None:
        check_shape(op, "residual", residual, tuple(y.shape))
    if shortcut is not None and (shortcut.shape[0], *(cdiv(n, shortcut_stride) for n in shortcut.shape[1:3])) != pixels:
        raise KernelError(
            f"{op}: shortcut is {list(shortcut.shape)}; at stride {shortcut_stride} it must give {list(pixels)} pixels"
        )
    if z is not None and weight3 is not None:
        check_shape(op, "z", z, (*pixels, channels))
        check_shape(op, "weight3", weight3, (channels, k))
