"""Choose the kernel of a convolution, from tuned tables first and then by rules, and launch it.

Every kernel here computes ``reference.conv2d``. They differ in the shapes they accept and in speed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastres.kernels.routing.cards import INTERPRETER, Gpu, gpu_of
from fastres.kernels.routing.rules import ConvConfig, ConvShape, route_conv, shared_memory
from fastres.kernels.routing.tables import Block, Index, Layer, Tuned, TunedBlock, table
from fastres.kernels.routing.without import VARIABLE as WITHOUT
from fastres.kernels.routing.without import left_out
from fastres.terminal import warn

from . import conv, conv_specialized, conv_tma, fused, gemm
from .launch import float32_precision
from .tma import tma_fits


class UntunedGpuWarning(UserWarning):
    """fastres has no table of tuned configurations for this GPU."""


def why_not(kernel: str, shape: ConvShape, dtype: torch.dtype, gpu: Gpu, out_dtype: torch.dtype | None = None) -> str:
    """Return the reason why ``kernel`` cannot run a convolution; empty if it can.

    ``out_dtype`` is the dtype that it writes, if that is not ``dtype``: a classifier writes float32.
    """
    if kernel in left_out():
        return f"{WITHOUT} leaves it out"
    if kernel in gemm.KERNELS:
        return gemm.why_not_gemm(shape, dtype, gpu)
    if kernel in conv_tma.KERNELS:
        return conv_tma.why_not_conv_tma(shape, dtype, gpu)
    if kernel in conv_specialized.KERNELS:
        return conv_specialized.why_not_conv_specialized(shape, dtype, gpu, out_dtype)
    return "" if kernel == "conv" else f"there is no kernel called {kernel!r}"


def why_not_layer(kernel: str, layer: Layer, gpu: Gpu) -> str:
    """Return the reason why ``kernel`` cannot run a layer; empty if it can."""
    return why_not(kernel, layer.shape, getattr(torch, layer.dtype), gpu, layer.out_dtype)


@functools.lru_cache(maxsize=4096)
def route(
    shape: ConvShape,
    dtype: torch.dtype,
    gpu: Gpu,
    *,
    residual: bool = False,
    precision: str = "ieee",
    classifier: bool = False,
) -> ConvConfig:
    """Return the kernel and configuration of a convolution: tuned for the nearest batch size, or chosen by rules.

    ``classifier`` is True if the convolution writes logits (:class:`~fastres.kernels.routing.tables.Layer`).
    """
    found = tuned(gpu)
    if not found.is_own:
        _hint(gpu, found.others)
    entry = tuned_for(Layer.of(shape, dtype, residual, classifier), gpu)
    return entry.config if entry else route_conv(shape, dtype, gpu, precision, residual=residual)


def tuned_for(layer: Layer, gpu: Gpu) -> Tuned | None:
    """Return the entry of the tables to use for ``layer``; None if the rules decide."""
    for entry in tuned(gpu).entries(layer):
        unsplit = entry.config.split == 1 or "split" not in left_out()
        if unsplit and not why_not_layer(entry.config.kernel, layer, gpu) and fits(entry.config, layer, gpu):
            found: Tuned = entry
            return found
    return None


def fits(config: ConvConfig, layer: Layer, gpu: Gpu) -> bool:
    """Return True if ``gpu`` has the shared memory that ``config`` needs. Its table may come from another card."""
    if gpu is INTERPRETER:
        return True
    dtype = getattr(torch, layer.dtype)
    if config.kernel in gemm.KERNELS or config.kernel in conv_tma.KERNELS:
        return tma_fits(config, gpu, residual=layer.residual, out_itemsize=layer.out_dtype.itemsize)
    return shared_memory(config, dtype, gpu) <= gpu.shared_memory


def tuned(gpu: Gpu) -> Index:
    """Return the tables for ``gpu``; the interpreter has none."""
    return Index() if gpu is INTERPRETER or "tables" in left_out() else table(gpu)


def why_not_block(kernel: str, block: Block, dtype: torch.dtype, gpu: Gpu) -> str:
    """Return the reason why ``kernel`` cannot run joined convolutions; empty if it can."""
    shape = block.shape
    if kernel in left_out() or (not block.fused and "merged" in left_out()):
        return f"{WITHOUT} leaves it out"
    if kernel in fused.KERNELS and block.fused:
        sizes = {"shortcut_channels": block.shortcut_channels, "next_channels": block.next_channels}
        return fused.why_not_fused(shape, block.channels, dtype, gpu, **sizes)
    if kernel in gemm.KERNELS and not block.fused:
        strided = "the matrix product takes a shortcut of stride 1" if block.shortcut_stride > 1 else ""
        return strided or gemm.why_not_gemm(shape, dtype, gpu)
    if kernel in conv_tma.KERNELS and not block.fused:
        return conv_tma.why_not_conv_tma(shape, dtype, gpu)
    return f"{kernel!r} does not join {'a 3×3 with the 1×1 after it' if block.fused else 'a shortcut'}"


def route_block(block: Block, dtype: torch.dtype, gpu: Gpu) -> TunedBlock | None:
    """Return the tuned entry for joined convolutions at the nearest batch size; None if there is none that can run."""
    for entry in tuned(gpu).entries(block):
        if not why_not_block(entry.config.kernel, block, dtype, gpu):
            found: TunedBlock = entry
            return found
    return None


@functools.cache
def _hint(gpu: Gpu, others: tuple[str, ...]) -> None:
    """Warn once that tuning could make this GPU faster."""
    if gpu is INTERPRETER or not torch.cuda.is_available():
        return
    used = f"the table of {others[0]} (same architecture)" if others else "rules"
    tune = "Run python -m fastres.bench.tune to find faster configurations"
    advice = "The general kernels run" if gpu.is_amd else tune
    warn(
        f"fastres has no table of tuned configurations for {gpu.name} ({gpu.arch}) and uses {used} instead. Results "
        f"are the same. {advice}. This warning is shown once",
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
    arrived: Tensor | None = None,
) -> None:
    """Write the convolution of ``x`` into ``y`` with the kernel that ``config`` names. Without it, routing chooses one.

    The tensors, including ``arrived``, are as in :func:`fastres.kernels.conv.conv2d_into`.
    """
    if config is None:
        shape = conv.conv_shape(x, weight, stride, padding, groups)
        precision = float32_precision()
        config = route(shape, x.dtype, gpu_of(x.device), residual=residual is not None, precision=precision)
    settings: dict[str, Any] = {"stride": stride, "padding": padding, "relu": relu, "config": config}
    if config.kernel in gemm.KERNELS:
        k, _, _, c = weight.shape
        rows = None if residual is None else residual.view(-1, k)
        gemm.gemm_into(y.view(-1, k), x.view(-1, c), weight.view(k, c), bias, rows, relu=relu, config=config)
    elif config.kernel in conv_tma.KERNELS or config.kernel in conv_specialized.KERNELS:
        k, r, s, _ = weight.shape
        into = conv_tma.conv_tma_into if config.kernel in conv_tma.KERNELS else conv_specialized.conv_specialized_into
        into(y, x, weight.view(k, -1), bias, residual, filter_size=(r, s), **settings)
    else:
        conv.conv2d_into(y, x, weight, bias, residual, groups=groups, arrived=arrived, **settings)


def merged_into(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shortcut: Tensor,
    *,
    filter_size: tuple[int, int],
    stride: int,
    padding: int,
    shortcut_stride: int,
    relu: bool,
    config: ConvConfig,
) -> None:
    """Write a convolution with a merged ``shortcut`` into ``y``; tensors as in :func:`conv_tma.conv_tma_into`."""
    if config.kernel in gemm.KERNELS:
        k, c, u = y.shape[3], x.shape[3], shortcut.shape[3]
        gemm.gemm_into(y.view(-1, k), x.view(-1, c), weight, bias, None, shortcut.view(-1, u), relu=relu, config=config)
        return
    conv_tma.conv_tma_into(
        y,
        x,
        weight,
        bias,
        None,
        shortcut,
        filter_size=filter_size,
        stride=stride,
        padding=padding,
        shortcut_stride=shortcut_stride,
        relu=relu,
        config=config,
    )
