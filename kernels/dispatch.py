"""One convolution, whichever kernel runs it: tuned tables first, then rules.

Every kernel here computes what ``reference.conv2d`` says; they differ in what they accept and how fast they are.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from . import conv, conv_tma, gemm
from .launch import float32_precision
from .routing import INTERPRETER, ConvConfig, ConvShape, Gpu, gpu_of, route_conv
from .tables import Layer, nearest, table


class UntunedGpuWarning(UserWarning):
    """This GPU has no table of tuned configurations."""


def why_not(kernel: str, shape: ConvShape, dtype: torch.dtype, gpu: Gpu) -> str:
    """Why ``kernel`` cannot take a convolution; empty where it can."""
    if kernel in gemm.KERNELS:
        return gemm.why_not_gemm(shape, dtype, gpu)
    if kernel in conv_tma.KERNELS:
        return conv_tma.why_not_conv_tma(shape, dtype, gpu)
    return "" if kernel == "conv" else f"there is no kernel called {kernel!r}"


@functools.lru_cache(maxsize=4096)
def route(
    shape: ConvShape, dtype: torch.dtype, gpu: Gpu, *, residual: bool = False, precision: str = "ieee"
) -> ConvConfig:
    """The kernel and configuration for a convolution: tuned for the nearest batch, or by rules."""
    found = table(gpu.name) if gpu is not INTERPRETER else {}
    entries = found.get(Layer.of(shape, dtype, residual).without_batch, [])
    for entry in nearest(entries, shape.N):
        if not why_not(entry.config.kernel, shape, dtype, gpu):
            return entry.config
    if not found:
        _hint(gpu)
    return route_conv(shape, dtype, gpu, precision)


@functools.cache
def _hint(gpu: Gpu) -> None:
    """Say once that this GPU could be faster."""
    if gpu is INTERPRETER or not torch.cuda.is_available():
        return
    advice = "the general kernels run" if gpu.is_amd else "python -m fastres.bench.tune finds faster configurations"
    warnings.warn(
        f"fastres has no tuned configurations for {gpu.name} ({gpu.arch}) and uses its rules: results are the same, "
        f"{advice}. This is said once",
        UntunedGpuWarning,
        stacklevel=2,
    )


def convolve_into(
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
) -> None:
    """Write the convolution of ``x`` into ``y`` with the kernel that ``config``, or the routing, names.

    Tensors as in :func:`fastres.kernels.conv.conv2d_into`.
    """
    if config is None:
        shape = conv.conv_shape(x, weight, stride, padding, groups)
        precision = float32_precision()
        config = route(shape, x.dtype, gpu_of(x.device), residual=residual is not None, precision=precision)
    if config.kernel in gemm.KERNELS:
        k, _, _, c = weight.shape
        rows = None if residual is None else residual.view(-1, k)
        gemm.gemm_into(y.view(-1, k), x.view(-1, c), weight.view(k, c), bias, rows, relu=relu, config=config)
    elif config.kernel in conv_tma.KERNELS:
        k, r, s, _ = weight.shape
        conv_tma.conv_tma_into(
            y,
            x,
            weight.view(k, -1),
            bias,
            residual,
            filter_size=(r, s),
            stride=stride,
            padding=padding,
            relu=relu,
            config=config,
        )
    else:
        conv.conv2d_into(
            y, x, weight, bias, residual, stride=stride, padding=padding, groups=groups, relu=relu, config=config
        )
