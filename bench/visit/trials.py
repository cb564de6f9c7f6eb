"""Trials of the kernels: each compares one kernel, on one problem, with a result in float32 or better.

Trials are grouped into families. If one trial of a family fails, the rest of a visit does not use the family. This
module has every family that a network on a GPU may use, and the kernels in 8 bit, which no network uses yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastres.bench.measure.kernel_timing import draw, error_limit
from fastres.bench.measure.problems_8bit import LIMITS, Problem, conv_problem, stem_problem
from fastres.bench.tuning import blocks, configurations
from fastres.bench.tuning.blocks import Case
from fastres.kernels import conv_specialized, conv_tma, dispatch, fused, gemm, head, reference, stem
from fastres.kernels.conv_8bit import E4M3, LEVELS, why_not_8bit
from fastres.kernels.launch import INTERPRETED
from fastres.kernels.routing.cards import Gpu
from fastres.kernels.routing.rules import STRIP, ConvConfig, ConvShape, StemConfig, strip_config
from fastres.kernels.routing.tables import Layer, Network
from fastres.network.architectures import Architecture
from fastres.text import dtype_name


@dataclass(frozen=True)
class Trial:
    """One kernel on one problem: ``run()`` computes its result, ``truth`` is the result in float32 or better."""

    name: str
    run: Callable[[], Tensor]
    truth: Tensor
    limit: float  # of the relative L2 error


@dataclass(frozen=True)
class Family:
    """Kernels that are used or left out together: their trials, and their source files."""

    what: str
    trials: Callable[[Gpu, bool], Iterator[Trial]]
    inputs: tuple[str, ...]
    layers: Callable[[Gpu, bool], list[tuple[Any, ConvConfig]]] = lambda gpu, small: []  # to compile ahead of time


def device_of_trials() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


# -- single convolutions -------------------------------------------------------------------------------------


def _shape(small: bool, n: int, size: int, c: int, k: int, r: int, stride: int = 1, groups: int = 1) -> ConvShape:
    """Return a convolution's shape. If ``small``, shrink it to one that takes an interpreter about a second."""
    if small:
        n, size, c, k = (n if n == conv_tma.MIN_BATCH else min(n, 2)), min(size, 5), min(c, 32), min(k, 64)
    return ConvShape(n, size, size, c, k, r, r, stride, r // 2, groups)


def _layers_of_conv(gpu: Gpu, small: bool) -> list[tuple[Layer, ConvConfig]]:
    shapes = [
        (_shape(small, 8, 56, 64, 64, 3), False), (_shape(small, 8, 56, 256, 128, 3, stride=2), False),
        (_shape(small, 8, 28, 128, 512, 1), True), (_shape(small, 3, 33, 24, 40, 3), True),
        (_shape(small, 8, 14, 32, 32, 3, groups=2), False), (_shape(small, 64, 14, 256, 512, 1), False),
    ]  # fmt: skip
    layers = [Layer.of(shape, torch.float16, residual) for shape, residual in shapes]
    return [(layer, replace(configurations.by_rules(layer, gpu), split=1)) for layer in layers]


def _layers_of_split(gpu: Gpu, small: bool) -> list[tuple[Layer, ConvConfig]]:
    tile = ConvConfig("conv", 64, 32, 16, 4, 2) if small else ConvConfig("conv", 64, 64, 64, 4, 3)
    found = []
    for shape, split in (
        (_shape(small, 1, 7, 512, 512, 3), 8), (_shape(small, 1, 14, 256, 256, 3), 4),
        (_shape(small, 1, 7, 2048, 512, 1), 2), (_shape(small, 8, 7, 512, 512, 3), 2),
    ):  # fmt: skip
        found += [(Layer.of(shape, torch.float16, residual), replace(tile, split=split)) for residual in (False, True)]
    return found


def _layers_of_tma(kernels: Sequence[str], small: bool) -> list[tuple[Layer, ConvConfig]]:
    """Return two tiles of each kernel: one on a layer without residual, and a narrow one on a layer with residual."""
    found = []
    for kernel in kernels:
        size = 1 if kernel in gemm.KERNELS else 3
        tiles = [(128, 128), (128, 64)] if kernel not in conv_specialized.KERNELS else [(128, 128), (256, 64)]
        known = (*gemm.CANDIDATES, *conv_tma.CANDIDATES, *conv_specialized.CANDIDATES)
        for (m, n), residual in zip(tiles, (False, True), strict=True):
            config = next(c for c in known if (c.kernel, c.block_m, c.block_n) == (kernel, m, n))
            shape = _shape(small, conv_tma.MIN_BATCH, 14, 256 if n == 128 else 64, 256 if n == 128 else 64, size)
            found.append((Layer.of(shape, torch.float16, residual), config))
    return found


def _conv_trials(layers: Sequence[tuple[Layer, ConvConfig]]) -> Iterator[Trial]:
    device = device_of_trials()
    for layer, config in layers:
        x, weight, bias, residual = configurations.make_tensors(layer, device)
        shape = layer.shape

        def run(
            layer: Layer = layer, config: ConvConfig = config, tensors: Any = (x, weight, bias, residual)
        ) -> Tensor:
            shape, (x, weight, *_) = layer.shape, tensors
            y = torch.full(
                (shape.N, shape.P, shape.Q, weight.shape[0]), torch.nan, dtype=layer.out_dtype, device=x.device
            )
            configurations.launch(layer, config, y, *tensors)
            return y

        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            truth = reference.conv2d(
                x.float(), weight.float(), bias, None if residual is None else residual.float(),
                stride=shape.stride, padding=shape.padding, groups=shape.groups, relu=layer.relu,
            )  # fmt: skip
        reduction = shape.R * shape.S * shape.C + 1 + layer.residual
        added = " +res" * layer.residual + f" in {config.split} parts" * (config.split > 1)
        name = f"{config.kernel} {shape.R}×{shape.S}/{shape.stride} {shape.C}→{shape.K} {shape.P}² N{shape.N}{added}"
        yield Trial(name, run, truth, error_limit(x.dtype, reduction))


# -- joined convolutions -------------------------------------------------------------------------------------

NARROW = Architecture("a stage", "bottleneck", (2,), (64,))


def _cases(gpu: Gpu, small: bool, kernels: Sequence[str]) -> list[tuple[Case, ConvConfig]]:
    """Return joined runs of a network's first stage: every kind, with the first configuration of these kernels."""
    batch, size = (conv_tma.MIN_BATCH, 32) if small else (conv_tma.MIN_BATCH, 112)
    found = []
    for case in blocks.cases_of(NARROW, batch, size, torch.float16, gpu):
        configs = [config for config in blocks.candidates(case.block, gpu) if config.kernel in kernels]
        found += [(case, config) for config in configs[:1]]
    return found[:1] if small else found


def _block_trials(cases: Sequence[tuple[Case, ConvConfig]]) -> Iterator[Trial]:
    device = device_of_trials()
    for case, config in cases:
        joined, values = blocks.with_data(case, device)
        exact = blocks.in_float32(joined, values)
        written = joined.writes
        truth = torch.cat([exact[value].flatten() for value in written])

        def run(joined: Any = joined, values: Any = values, config: ConvConfig = config) -> Tensor:
            for value in joined.writes:
                values[value].fill_(torch.nan)
            blocks.run_joined(joined, values, config)
            return torch.cat([values[value].flatten() for value in joined.writes])

        # A value between two products may be rounded up or down.
        limit = 2 * torch.finfo(values[written[0]].dtype).eps
        yield Trial(f"{config.kernel} {case.run.name}", run, truth, limit)


# -- the other kernels ---------------------------------------------------------------------------------------


def _stem_trials(gpu: Gpu, small: bool) -> Iterator[Trial]:
    """Try the stem that computes one convolution row after the other, from images as they are and prepared ones."""
    plain, prepared = StemConfig("stem_pool", 64, 2, 4, 1), StemConfig("stem_pool", 128, 8, 8, 3, prepared=True)
    cases = ((2, 32, plain),) if small else ((2, 224, plain), (3, 97, plain), (16, 224, prepared))
    return _stems(cases, torch.float16)


def _strip_trials(gpu: Gpu, small: bool) -> Iterator[Trial]:
    sizes = ((1, 32, 3),) if small else ((2, 224, 1), (3, 97, 7), (16, 224, 56))
    cases = [(n, size, strip_config(rows)) for n, size, rows in sizes]
    for dtype in (torch.float16,) if small else (torch.float16, torch.bfloat16):
        yield from _stems(cases, dtype)


def _stems(cases: Sequence[tuple[int, int, StemConfig]], dtype: torch.dtype) -> Iterator[Trial]:
    """Yield a trial of every kind of image for each (images, their size, configuration)."""
    device = device_of_trials()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    weight, bias = draw((64, 7, 7, 3), dtype, device, (2 / 147) ** 0.5), draw((64,), torch.float32, device, 0.5)
    packed = stem.pack_stem_weight(weight)
    normalisation = stem.pack_normalisation(mean, std, packed.shape[2], device)
    for n, size, config in cases:
        images = draw((n, 3, size, size), torch.float32, device)
        for source in (images, images.to(dtype), (images * 50 + 128).clamp(0, 255).to(torch.uint8)):
            settings: dict[str, Any] = {"stride": 2, "padding": 3, "pool": True}
            p = (size + 1) // 2 // 2 + ((size + 1) // 2) % 2

            def run(
                source: Tensor = source, shape: tuple[int, ...] = (n, p, p, 64), config: StemConfig = config
            ) -> Tensor:
                y = torch.full(shape, torch.nan, dtype=dtype, device=device)
                stem.stem_into(y, source, packed, bias, *normalisation, stride=2, padding=3, pool=True, config=config)
                return y

            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                exact = source if source.dtype == torch.uint8 else source.float()
                truth = reference.stem(exact, weight.float(), bias, mean, std, **settings)
            name = f"{config.kernel} {dtype_name(source.dtype)} {size}² N{n}" + ", prepared" * config.prepared
            yield Trial(name, run, truth, 2 * torch.finfo(dtype).eps)  # pixels are rounded before they are multiplied


def _head_trials(gpu: Gpu, small: bool) -> Iterator[Trial]:
    device, dtype = device_of_trials(), torch.float16
    for n, size, c, classes in (
        ((2, 3, 64, 40),) if small else ((8, 7, 2048, 1000), (1, 7, 512, 1000), (64, 7, 2048, 10))
    ):
        x = draw((n, size, size, c), dtype, device)
        weight, bias = draw((classes, c), dtype, device, c**-0.5), draw((classes,), torch.float32, device)
        pooled = x.float().mean((1, 2))

        def pool(x: Tensor = x) -> Tensor:
            y = torch.full((x.shape[0], x.shape[3]), torch.nan, dtype=dtype, device=device)
            head.average_pool_into(y, x)
            return y

        rows = pooled.to(dtype)

        def classify(rows: Tensor = rows, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            y = torch.full((rows.shape[0], weight.shape[0]), torch.nan, device=device)
            head.linear_into(y, rows, weight, bias)
            return y

        yield Trial(f"average pool {size}² {c} N{n}", pool, pooled, error_limit(dtype, size * size))
        truth = pooled.to(dtype).double() @ weight.double().T + bias.double()
        yield Trial(f"classifier {c}→{classes} N{n}", classify, truth, error_limit(torch.float32, c + 1))


def _kinds_of_8_bit(gpu: Gpu) -> list[torch.dtype]:
    """Return the kinds of 8-bit numbers that can be tried on ``gpu``. The interpreter rounds to e4m3 wrongly."""
    return [dtype for dtype in (LEVELS, E4M3) if not why_not_8bit(dtype, gpu) and not (INTERPRETED and dtype == E4M3)]


def _trial_of(name: str, problem: Problem) -> Trial:
    def run() -> Tensor:
        problem.y.fill_(255 if problem.y.dtype == LEVELS else torch.nan)
        problem.run()
        return problem.y.to(torch.float32)

    return Trial(name, run, problem.expected, LIMITS[problem.y.dtype])


def _conv_8bit_trials(gpu: Gpu, small: bool) -> Iterator[Trial]:
    for dtype in _kinds_of_8_bit(gpu):
        for shape, residual in (
            (_shape(small, 8, 56, 64, 64, 3), False), (_shape(small, 8, 28, 256, 256, 3, stride=2), False),
            (_shape(small, 8, 28, 128, 512, 1), True), (_shape(small, 3, 33, 24, 40, 3), True),
        ):  # fmt: skip
            problem = conv_problem(shape, dtype, device_of_trials(), residual=residual, relu=not residual, checked=8)
            name = f"conv {dtype_name(dtype)} {shape.R}×{shape.S}/{shape.stride} {shape.C}→{shape.K} {shape.P}²"
            yield _trial_of(name + " +res" * residual, problem)


def _stem_8bit_trials(gpu: Gpu, small: bool) -> Iterator[Trial]:
    for dtype in _kinds_of_8_bit(gpu):
        for n, size, raw in ((2, 32, True),) if small else ((2, 224, True), (3, 97, False), (16, 224, True)):
            problem = stem_problem(n, size, dtype, device_of_trials(), raw=raw, checked=16)
            yield _trial_of(f"stem {dtype_name(dtype)} {size}² N{n}" + ", floats" * (not raw), problem)


def _network(small: bool) -> tuple[Any, Tensor]:
    """Return an executor of a small network, and images for it."""
    from fastres.bench.measure.calibration import calibrated, smooth_images
    from fastres.executors.gpu import GpuExecutor
    from fastres.folding.build import build_plan
    from fastres.network.architectures import get_architecture

    device = device_of_trials()
    arch = get_architecture("resnet20" if small else "resnet18")
    state = {key: value.to(device) for key, value in calibrated(arch).state_dict().items()}
    images = smooth_images(2, *((32, 32) if small else (224, 224)), seed=3).to(device, torch.float16)
    return GpuExecutor(build_plan(state, arch, dtype=torch.float16)), images


def _early_trials(gpu: Gpu, small: bool) -> Iterator[Trial]:
    """Launch kernels before their predecessors end, in a CUDA graph; the bits must equal those of plain launches."""
    executor, x = _network(small)
    n, _, h, w = x.shape
    way = Network("", n, h, w, "float16", joined=False, early=True)
    yield _graphed("early launches in a graph", lambda: executor.run_as(x, ("logits",), way)[0], executor, x)


def _graph_trials(gpu: Gpu, small: bool) -> Iterator[Trial]:
    """Replay a captured network; the bits must equal those of plain launches."""
    executor, x = _network(small)
    yield _graphed("a network in a graph", lambda: executor.run_as(x, ("logits",), None)[0], executor, x)


def _graphed(name: str, call: Callable[[], Tensor], executor: Any, x: Tensor) -> Trial:
    truth = executor.run_as(x, ("logits",), None)[0].clone()
    call()  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = call()

    # The graph has the addresses of the weights and of the images, but does not keep them.
    def replay(_kept: tuple[Any, ...] = (executor, x)) -> Tensor:
        logits.fill_(torch.nan)
        graph.replay()
        return logits.clone()

    return Trial(name, replay, truth, 0.0)


def _of_layers(
    layers: Callable[[Gpu, bool], list[tuple[Layer, ConvConfig]]],
) -> Callable[[Gpu, bool], Iterator[Trial]]:
    return lambda gpu, small: _conv_trials(layers(gpu, small))


def _tma_family(what: str, kernels: tuple[str, ...], *inputs: str) -> Family:
    def layers(gpu: Gpu, small: bool) -> list[tuple[Layer, ConvConfig]]:
        return _layers_of_tma(kernels, small)

    return Family(what, _of_layers(layers), (*inputs, "kernels/tma.py"), layers)


_CONV = ("kernels/conv.py", "kernels/routing/*.py")
FAMILIES = {
    "conv": Family("the general convolution", _of_layers(_layers_of_conv), _CONV, _layers_of_conv),
    "split": Family("reductions split between programs", _of_layers(_layers_of_split), _CONV, _layers_of_split),
    "stem": Family("the first convolution and its pool", _stem_trials, ("kernels/stem.py", "kernels/prepare.py")),
    "stem_strip": Family("the same in strips", _strip_trials, ("kernels/stem_strip.py", "kernels/prepare.py")),
    "conv_8bit": Family("the general convolution in 8 bit", _conv_8bit_trials, ("kernels/conv_8bit.py",)),
    "stem_8bit": Family("the stem in 8 bit", _stem_8bit_trials, ("kernels/conv_8bit.py", "kernels/stem_8bit.py")),
    "head": Family("average pool and classifier", _head_trials, ("kernels/head.py", *_CONV)),
    "graphs": Family("CUDA graphs", _graph_trials, (*_CONV, "fastres/executors/gpu.py", "fastres/executors/graphs.py")),
    "early": Family("early launches", _early_trials, (*_CONV, "fastres/executors/gpu.py")),
    "gemm": _tma_family("1×1 convolutions by TMA", gemm.KERNELS, "kernels/gemm.py"),
    "conv_tma": _tma_family("convolutions by TMA", conv_tma.KERNELS, "kernels/conv_tma.py"),
    "conv_specialized": _tma_family(
        "convolutions with a producer warp", conv_specialized.KERNELS[:1], "kernels/conv_specialized*.py"
    ),
    "conv_specialized_compact": _tma_family(
        "the same with compact boxes", conv_specialized.KERNELS[1:], "kernels/conv_specialized*.py"
    ),
    "merged": Family(
        "shortcuts merged into a convolution",
        lambda gpu, small: _block_trials(_cases(gpu, small, (*gemm.KERNELS, *conv_tma.KERNELS))),
        ("kernels/gemm.py", "kernels/conv_tma.py", "kernels/tma.py"),
        lambda gpu, small: [(c.block, config) for c, config in _cases(gpu, small, (*gemm.KERNELS, *conv_tma.KERNELS))],
    ),
    "fused": Family(
        "a 3×3 and its 1×1 neighbours in one kernel",
        lambda gpu, small: _block_trials(_cases(gpu, small, fused.KERNELS)),
        ("kernels/fused.py", "kernels/tma.py"),
        lambda gpu, small: [(case.block, config) for case, config in _cases(gpu, small, fused.KERNELS)],
    ),
}


def why_not(name: str, gpu: Gpu, small: bool = False) -> str:
    """Return the reason why no trial of a family can run on ``gpu``; empty if one can. ``small`` is as in its trials.

    If only some of its layers are refused, their trials run and fail, so that it shows.
    """
    if name == "early" and (gpu.is_amd or (gpu.arch < "sm_90" and gpu.arch != "sm_120")):
        return f"early launches need sm_90 or later, and {gpu.name} is {gpu.arch}"
    if name == STRIP and gpu.arch != "sm_90":
        return f"the stem in strips is made for sm_90, and {gpu.name} is {gpu.arch}"
    if name.endswith("_8bit"):
        return why_not_8bit(LEVELS, gpu)
    if INTERPRETED and (name == "early" or name.startswith("conv_specialized")):
        return "Triton's interpreter supports neither Gluon kernels nor early launches"
    layers = FAMILIES[name].layers(gpu, small)
    if name in ("merged", "fused"):
        return "" if layers else f"no kernel joins convolutions on {gpu.name} ({gpu.arch})"
    reasons = [dispatch.why_not_layer(config.kernel, layer, gpu) for layer, config in layers]
    return reasons[0] if reasons and all(reasons) else ""
