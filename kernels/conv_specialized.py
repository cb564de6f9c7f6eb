"""Convolution + bias + residual + ReLU for Hopper with specialised warps: one loads while eight multiply.

    y[n, p, q, k] = relu(bias[k] + residual[n, p, q, k]
                         + Σ_{r, s, c} x[n, p·stride + r − padding, q·stride + s − padding, c] · w[k, r, s, c])

Triton itself does not specialise warps on Hopper, so the kernel is written in Gluon, Triton's lower level
(``conv_specialized_gluon.py``). A producer warp keeps the buffers filled through the tensor memory accelerator (TMA)
and runs ahead across tile boundaries, also with the residual. The consumers multiply from the buffers (wgmma, both
operands from shared memory) and finish and store a tile while the next one is fetched. Programs are persistent.

A tile is BLOCK_M = TN·TH·TW output pixels (TH × TW pixels of TN images) × BLOCK_N channels. Its input for one tap of
the filter is a box of the same extent, shifted: one TMA copy, with zeros outside the image. Taps that miss the image
for the whole tile are skipped. At stride 2 the image is described by the parity of its rows and columns,
[N, H/2, 2, W/2, 2·C], so that every second pixel also forms a box.

Activations are NHWC in float16 or bfloat16, weights KRSC, bias float32 [K]; accumulation is float32. The stride is 1,
or 2 with even H and W. The padding is smaller than the filter, C is a multiple of 64 and K of 8. The kernel needs an
NVIDIA GPU of the sm_90 family. Triton's interpreter does not run Gluon; the tests simulate it.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from fastres.errors import KernelError
from fastres.kernels.routing.cards import INTERPRETER, Gpu, gpu_of
from fastres.kernels.routing.rules import ConvConfig, ConvShape
from fastres.text import dtype_name

from .conv_tma import check_conv_tma, conv_tma_shape
from .launch import cdiv, device_guard
from .tma import why_not_tma

# Two ways to choose tiles. The first minimises products: if there are many images, a tile is one pixel of many images.
# The compact one needs the fewest tiles and, among those, spans the fewest images. Its boxes span fewer memory pages.
KERNELS = ("conv_specialized", "conv_specialized_compact")

BLOCK_K = 64  # 128 bytes, the row that TMA and wgmma swizzle
CONSUMER_WARPS = 8  # two warp groups; with the producer's registers, one program fills a multiprocessor

# Candidates to time for a layer: (BLOCK_M, BLOCK_N, stages). All fit sm_90; none spills in Triton 3.6.0 or 3.7.1.
CANDIDATES = tuple(
    ConvConfig(kernel, m, n, BLOCK_K, CONSUMER_WARPS, stages)
    for kernel in KERNELS
    for m, n, stages in (
        (128, 256, 3),
        (256, 128, 3),
        (128, 128, 4),
        (128, 128, 6),
        (256, 64, 4),
        (128, 64, 4),
        (128, 64, 8),
    )
)

# If less than this share of the tiles' pixels is in use, the waste outweighs every other gain.
LEAST_USE = 0.5


@functools.cache
def why_no_gluon() -> str:
    """Return why this Triton cannot compile the kernel; empty if it can."""
    try:
        from . import conv_specialized_gluon  # noqa: F401
    except (ImportError, AttributeError) as error:
        import triton

        return f"the kernel does not support the version of Gluon in Triton {triton.__version__} ({error})"
    return ""


def why_not_conv_specialized(
    shape: ConvShape, dtype: torch.dtype, gpu: Gpu, out_dtype: torch.dtype | None = None
) -> str:
    """Return why this kernel cannot, or should not, take a convolution; empty if it can.

    TMA swizzles rows of at most 128 bytes. Boxes of y have rows of 64 elements, so an element may have 2 bytes.
    """
    if gpu is INTERPRETER:
        return "Triton's interpreter does not run Gluon"
    if out_dtype not in (None, dtype):
        return f"the kernel writes the dtype that it reads, {dtype_name(dtype)}, not {dtype_name(out_dtype)}"
    if shape.groups != 1:
        return "the convolution with specialised warps takes no groups"
    if shape.padding >= min(shape.R, shape.S):
        return f"padding {shape.padding} must be smaller than the {shape.R}×{shape.S} filter"
    if shape.stride not in (1, 2) or (shape.stride == 2 and (shape.H % 2 or shape.W % 2)):
        return f"stride {shape.stride} on {shape.H}×{shape.W} pixels; the kernel takes stride 1, or 2 on even sizes"
    if shape.C % BLOCK_K:
        return f"the kernel takes multiples of {BLOCK_K} input channels, not {shape.C}"
    if reason := why_not_tma(dtype, gpu, shape.C, shape.K):
        return reason
    tiles = pixel_tiles(shape, box_of(shape, 128))
    if tiles * 128 * LEAST_USE > shape.M:
        return f"tiles of 128 pixels are mostly empty on {shape.N} images of {shape.P}×{shape.Q}"
    return why_no_gluon()


@functools.lru_cache(maxsize=4096)
def box_of(shape: ConvShape, pixels: int, kernel: str = KERNELS[0]) -> tuple[int, int, int]:
    """Return the best tile (TN, TH, TW) for ``shape`` and ``kernel``, with ``pixels`` pixels, a power of two.

    Pixels past the edge are wasted work. Taps past the edge are skipped; tiles with few pixels per image skip more.
    """
    sizes = [1 << bit for bit in range(pixels.bit_length())]
    boxes = [(pixels // (h * w), h, w) for h, w in itertools.product(sizes, sizes) if h * w <= pixels]
    if kernel == "conv_specialized_compact":
        return min(boxes, key=lambda box: (pixel_tiles(shape, box), box[0], box[1] + box[2]))
    return min(boxes, key=lambda box: (_products(shape, box), -box[2]))


def _products(shape: ConvShape, box: tuple[int, int, int]) -> int:
    """Count the pairs of a tile and a tap that reaches its image."""
    rows = _taps(shape, shape.H, shape.P, shape.R, box[1])
    columns = _taps(shape, shape.W, shape.Q, shape.S, box[2])
    return cdiv(shape.N, box[0]) * rows * columns


def _taps(shape: ConvShape, size: int, out: int, taps: int, block: int) -> int:
    """Count the taps of the filter along one axis that reach the image, summed over blocks of output pixels."""
    return sum(
        min(size + shape.padding - shape.stride * first, taps)
        - max(shape.padding - shape.stride * (first + block - 1), 0)
        for first in range(0, out, block)
    )


def pixel_tiles(shape: ConvShape, box: tuple[int, int, int]) -> int:
    """Return how many tiles cover the output pixels."""
    return cdiv(shape.N, box[0]) * cdiv(shape.P, box[1]) * cdiv(shape.Q, box[2])


def conv_specialized_tiles(shape: ConvShape, config: ConvConfig) -> int:
    """Return how many tiles the output has."""
    return pixel_tiles(shape, box_of(shape, config.block_m, config.kernel)) * cdiv(shape.K, config.block_n)


def conv_specialized_constants(shape: ConvShape, config: ConvConfig, *, residual: bool, relu: bool) -> dict[str, Any]:
    """Return the kernel's compile-time arguments. Launches and ahead-of-time compilations must agree on them."""
    from .conv_specialized_gluon import accumulator_layout

    return {
        **shape.constants,
        "HAS_RESIDUAL": residual,
        "RELU": relu,
        **config.blocks,
        "STAGES": config.num_stages,
        "BOX": box_of(shape, config.block_m, config.kernel),
        "LAYOUT": accumulator_layout(config.num_warps, config.block_n),
    }


def conv_specialized_boxes(shape: ConvShape, config: ConvConfig) -> dict[str, list[int]]:
    """Return the box that each descriptor moves, by kernel argument."""
    n, h, w = box_of(shape, config.block_m, config.kernel)
    out = [n, h, w, config.block_n]
    return {
        "x_desc": [n, h, w, config.block_k] if shape.stride == 1 else [n, h, 1, w, config.block_k],
        "w_desc": [config.block_n, config.block_k],
        "residual_desc": out,
        "y_desc": out,
    }


def conv_specialized_into(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    filter_size: tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    relu: bool = False,
    config: ConvConfig,
) -> None:
    """Write the convolution of ``x`` into ``y``.

    ``x`` [N, H, W, C], ``weight`` [K, R·S·C] (KRSC, flattened), ``bias`` float32 [K], ``y`` and ``residual``
    [N, P, Q, K]; ``filter_size`` is (R, S). All are contiguous, on one device and aligned to 16 bytes; all but ``bias``
    share a dtype, float16 or bfloat16. ``y`` may be the same tensor as ``residual``, but must not overlap any other
    tensor. Arguments are not checked here; :func:`conv_specialized` checks them.
    """
    from .conv_specialized_gluon import conv_specialized_kernel, describe

    shape = conv_tma_shape(x, weight, filter_size, stride, padding)
    boxes = conv_specialized_boxes(shape, config)
    # In [N, H/2, 2, W/2, 2·C], every second pixel forms a box.
    images = x if stride == 1 else x.view(shape.N, shape.H // 2, 2, shape.W // 2, 2 * shape.C)
    tensors = {"x_desc": images, "w_desc": weight, "residual_desc": residual, "y_desc": y}
    tiles = conv_specialized_tiles(shape, config)
    with device_guard(x.device):
        conv_specialized_kernel[(min(tiles, gpu_of(x.device).multiprocessors),)](
            **{name: None if tensor is None else describe(tensor, boxes[name]) for name, tensor in tensors.items()},
            bias_ptr=bias,
            tiles=tiles,
            **conv_specialized_constants(shape, config, residual=residual is not None, relu=relu),
            num_warps=config.num_warps,
        )


def conv_specialized(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    filter_size: tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    relu: bool = False,
    config: ConvConfig,
) -> Tensor:
    """Check the arguments of :func:`conv_specialized_into` and return the convolution as a new tensor [N, P, Q, K].

    Raises ``KernelError``, ``DtypeError`` or ``DeviceError``.
    """
    op = "fastres::conv_specialized"
    shape = conv_tma_shape(x, weight, filter_size, stride, padding)
    y = x.new_empty(shape.N, max(shape.P, 0), max(shape.Q, 0), shape.K)
    check_conv_tma(y, x, weight, bias, residual, None, shape, 1, op=op)
    if y.numel():
        if reason := why_not_conv_specialized(shape, x.dtype, gpu_of(x.device)):
            raise KernelError(f"{op}: {reason}")
        settings: dict[str, Any] = {"filter_size": filter_size, "stride": stride, "padding": padding, "relu": relu}
        conv_specialized_into(y, x, weight, bias, residual, **settings, config=config)
    return y
