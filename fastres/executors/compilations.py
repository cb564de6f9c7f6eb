"""List the kernels that a network launches, as compilations that need no GPU.

``python -m fastres.kernels.inspection`` and its TMA counterpart compile and inspect them.
"""

from __future__ import annotations

from typing import Any

import torch

from fastres.folding.build import outline
from fastres.kernels import conv_specialized, conv_tma, fused, gemm
from fastres.kernels.conv_8bit import LEVELS, default_config
from fastres.kernels.head import linear_shape
from fastres.kernels.inspection.ahead_of_time import Compilation
from fastres.kernels.inspection.kernels_8bit import compile_conv_8bit, compile_prepare_8bit, compile_stem_8bit
from fastres.kernels.inspection.pointer_kernels import (
    compile_conv,
    compile_pool,
    compile_prepare,
    compile_squeeze_excite,
    compile_stem,
    compile_window_pool,
)
from fastres.kernels.inspection.tma_kernels import (
    compile_conv_specialized,
    compile_conv_tma,
    compile_fused,
    compile_gemm,
    layer_label,
    shown_configs,
)
from fastres.kernels.launch import next_power_of_2
from fastres.kernels.routing.cards import H100, Gpu
from fastres.kernels.routing.rules import ConvShape, route_conv, route_pool, route_stem, route_window_pool
from fastres.kernels.stem_8bit import stem_config
from fastres.network.architectures import get_architecture
from fastres.network.plan import Conv, Head, Plan, Pool, SqueezeExcite, Stem
from fastres.roofline.gpu_shapes import conv_shape


def plan_compilations(
    plan: Plan, gpu: Gpu, *, batch: int, height: int = 224, width: int = 224, dtype: torch.dtype = torch.float16
) -> list[Compilation]:
    """Return every distinct compilation that ``plan`` needs on ``gpu`` for this input, in plan order."""
    shapes = plan.shapes(batch, height, width)
    sources = dict.fromkeys((dtype, torch.float32, torch.uint8))  # of images
    found: dict[tuple[Any, ...], Compilation] = {}
    for step in plan:
        shape = shapes[step.input]
        made: list[Compilation] = []
        if isinstance(step, Stem):
            config = route_stem(step.weight.shape[0], step.conv_shape(shape)[:3], dtype, gpu, step.pool)
            size = tuple(step.weight.shape)
            made = [
                compile_stem(size, dtype, source, config, stride=step.stride, padding=step.padding, pool=step.pool)
                for source in sources
            ]
            if config.prepared:
                made += [compile_prepare(dtype, source, padding=step.padding) for source in sources]
        elif isinstance(step, Conv):
            sizes = conv_shape(step, shape)
            routed = route_conv(sizes, dtype, gpu, residual=step.residual is not None)
            label = _label(sizes, step)
            made = [compile_conv(sizes, dtype, routed, residual=step.residual is not None, relu=step.relu, label=label)]
        elif isinstance(step, Pool):
            made = [compile_window_pool(shape[3], step.mode, dtype, route_window_pool(shape[3]))]
        elif isinstance(step, SqueezeExcite):
            made = compile_squeeze_excite(step.weight.shape[0], shape, dtype, lambda s: route_conv(s, dtype, gpu))
        elif isinstance(step, Head):
            classes, channels = step.weight.shape
            made = [compile_pool(channels, dtype, route_pool(channels, shape[1] * shape[2]))]
            linear = linear_shape(batch, channels, classes)
            routed = route_conv(linear, dtype, gpu)
            label = f"linear {channels}→{classes}"
            made.append(compile_conv(linear, dtype, routed, residual=False, relu=False, out=torch.float32, label=label))
        for item in made:
            found.setdefault((item.kernel, item.types, item.constants, item.num_warps, item.num_stages), item)
    return list(found.values())


def plan_compilations_8bit(
    plan: Plan, gpu: Gpu, *, batch: int, height: int = 224, width: int = 224, dtype: torch.dtype = LEVELS
) -> list[Compilation]:
    """Return what the stem and the convolutions of ``plan`` would need in 8 bit (uint8 levels or e4m3).

    No executor launches these kernels yet. They have their default configurations.
    """
    shapes = plan.shapes(batch, height, width)
    found: dict[tuple[Any, ...], Compilation] = {}
    for step in plan:
        shape = shapes[step.input]
        made: list[Compilation] = []
        if isinstance(step, Stem):
            n, p, q, _ = shapes[step.output]
            size, config = tuple(step.weight.shape), stem_config(q, p, n, gpu)
            made = [compile_stem_8bit(size, dtype, config, stride=step.stride, pool=step.pool)]
            sources = (torch.float32, torch.float16, torch.uint8)
            made += [compile_prepare_8bit(dtype, source, padding=step.padding) for source in sources]
        elif isinstance(step, Conv):
            sizes, residual = conv_shape(step, shape), step.residual is not None
            tile, label = default_config(sizes, dtype, gpu, residual=residual), _label(sizes, step)
            made = [compile_conv_8bit(sizes, dtype, tile, residual=residual, relu=step.relu, label=label)]
        for item in made:
            found.setdefault((item.kernel, item.types, item.constants, item.num_warps, item.num_stages), item)
    return list(found.values())


def _label(shape: ConvShape, step: Conv) -> str:
    label = f"{shape.R}×{shape.S}/{shape.stride} {shape.C}→{shape.K}"
    return label + f" g{shape.groups}" * (shape.groups > 1) + " +res" * bool(step.residual)


def tma_compilations(model: str, batch: int, dtype: torch.dtype, size: int = 224) -> list[Compilation]:
    """Return the compilations of :func:`shown_configs` for the distinct convolutions of ``model`` that TMA kernels run.

    If a block projects its shortcut, its last convolution is also listed with the projection merged in. If the fused
    kernel supports a bottleneck, it is listed with the first fused candidate, alone and with the next block's first
    convolution.
    """

    plan = outline(get_architecture(model), dtype)
    shapes = plan.shapes(batch, size, size)
    convs = {step.output: step for step in plan if isinstance(step, Conv)}
    layers: dict[tuple[ConvShape, bool, int, int], None] = {}
    for step in convs.values():
        shape = conv_shape(step, shapes[step.input])
        layers[shape, step.residual is not None, 0, 1] = None
        projection = convs.get(step.residual or "")
        if projection is not None and not projection.relu and projection.weight.shape[1] == 1:
            layers[shape, False, projection.weight.shape[3], projection.stride] = None
    found: list[Compilation] = []
    for shape, residual, u, stride in layers:
        label = layer_label(shape, residual=residual, shortcut_channels=u)
        if stride == 1 and not gemm.why_not_gemm(shape, dtype, H100):
            found += [
                compile_gemm(
                    shape.C, shape.K, dtype, config, residual=residual, relu=True, shortcut_channels=u, label=label
                )
                for config in shown_configs(gemm.KERNELS, shape.K, residual=residual)
            ]
        elif not conv_tma.why_not_conv_tma(shape, dtype, H100):
            found += [
                compile_conv_tma(
                    shape, dtype, config, residual=residual, relu=True, shortcut_channels=u, shortcut_stride=stride,
                    label=label,
                )
                for config in shown_configs(conv_tma.KERNELS, shape.K, residual=residual)
            ]  # fmt: skip
        if not u and not conv_specialized.why_not_conv_specialized(shape, dtype, H100):
            config = next(c for c in conv_specialized.CANDIDATES if c.block_n <= max(64, next_power_of_2(shape.K)))
            found.append(compile_conv_specialized(shape, dtype, config, residual=residual, relu=True, label=label))
    return found + _fused_compilations(convs, shapes, dtype)


def _fused_compilations(convs: dict[str, Conv], shapes: dict[str, Any], dtype: torch.dtype) -> list[Compilation]:
    """Return the compilations of the fused kernel for each distinct bottleneck in ``convs`` that it supports."""

    found: dict[Compilation, None] = {}
    for last in convs.values():
        middle = convs.get(last.input)
        if last.residual is None or middle is None or last.weight.shape[1] != 1 or middle.weight.shape[1] == 1:
            continue
        shape, k = conv_shape(middle, shapes[middle.input]), last.weight.shape[0]
        projection = convs.get(last.residual)
        projected = projection is not None and not projection.relu and projection.weight.shape[1] == 1
        u, stride = (projection.weight.shape[3], projection.stride) if projection is not None and projected else (0, 1)
        after = [conv for conv in convs.values() if conv.input == last.output and conv.relu]
        for channels in (0, *(conv.weight.shape[0] for conv in after if conv.weight.shape[1] == 1)):
            sizes = {"shortcut_channels": u, "next_channels": channels}
            if not fused.why_not_fused(shape, k, dtype, H100, **sizes):
                item = compile_fused(shape, k, dtype, fused.CANDIDATES[0], shortcut_stride=stride, **sizes)
                found[item] = None
    return list(found)
