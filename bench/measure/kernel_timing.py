"""What the kernel benchmarks in ``bench/kernels`` share: layers, the correctness limit, timing on the GPU.

A launch costs the host more than many a kernel costs the GPU, so many launches are captured in a CUDA graph, and the
graph is timed. All launches use the same tensors: what fits the L2 cache stays there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastres.network.architectures import get_architecture
from fastres.network.folding import outline
from fastres.network.plan import Conv, Shape, Step, describe

from . import ceilings
from .timing import captured

LAUNCHES = 20  # in one graph: 10 µs to start the graph then weigh half a microsecond on each
ROUNDS, WARMUPS = 30, 5
SEED = 0


@dataclass(frozen=True)
class Layer:
    """A step of a plan with the shape of its input (NHWC), its FLOPs and its unavoidable bytes."""

    step: Step
    shape: Shape
    flops: int
    bytes: int

    def __str__(self) -> str:
        """An identifier such as ``56×56×64→256-1×1/1-residual-relu-N32``."""
        n, h, w, c = self.shape
        words = describe(self.step).replace("+ ", "").replace(" ", "-")
        return f"{h}×{w}×{c}→{self.step.weight.shape[0]}-{words}-N{n}"


def layers(kind: str, batch: int, dtype: torch.dtype, model: str = "resnet50", size: int = 224) -> list[Layer]:
    """The steps of ``kind`` (``"stem"``, ``"conv"``, ``"head"``), each distinct one once. Weights hold no data."""
    plan = outline(get_architecture(model), dtype)
    found: dict[str, Layer] = {}
    for step, cost in zip(plan, plan.costs(batch, size, size, dtype), strict=True):
        if step.kind == kind:
            layer = Layer(step, cost.input_shape, cost.flops, cost.bytes)
            found.setdefault(str(layer), layer)
    return list(found.values())


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    """Normal numbers times ``scale``, the same for the same shape."""
    generator = torch.Generator(device).manual_seed(SEED + math.prod(shape))
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)


def draw_parameters(step: Step, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A weight that keeps activations at unit variance, and a bias, for ``step``."""
    fan = step.weight[0].numel()
    weight = draw(tuple(step.weight.shape), dtype, device, (2 / fan) ** 0.5)
    return weight, draw(tuple(step.bias.shape), torch.float32, device, 0.5)


def error_limit(dtype: torch.dtype, reduction: int) -> float:
    """Largest accepted relative L2 error of a sum of ``reduction`` products, accumulated in float32, kept in ``dtype``.

    Rounding the result costs at most half an epsilon. Rounding errors of the sum add up like a random walk, but tensor
    cores truncate where they add up a step of 16 products or more, always towards zero.
    """
    return torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps * (2 * reduction**0.5 + reduction / 16)


def assert_right(found: Tensor, expected: Tensor, dtype: torch.dtype, reduction: int) -> None:
    """Compare with the float64 ``expected``; a kernel that is wrong is not timed. NaN fails."""
    assert found.shape == expected.shape
    assert expected.dtype == torch.float64
    error = float((found.double() - expected).norm() / expected.norm())
    assert error <= error_limit(dtype, reduction), f"relative error {error:.2e}, not timed"


def conv_reduction(step: Step) -> int:
    """Products summed for one output, the residual and the bias among them."""
    return step.weight[0].numel() + 1 + (isinstance(step, Conv) and step.residual is not None)


def time_kernel(benchmark: Any, launch: Callable[[], object], layer: Layer, dtype: torch.dtype, config: object) -> None:
    """Time ``launch`` under pytest-benchmark; notes microseconds, TFLOP/s, GB/s and the share of the roofline.

    pytest-benchmark's own table is of graphs of ``LAUNCHES`` launches; ``extra_info`` is of one.
    """
    graph = captured(launch, LAUNCHES)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    benchmark.pedantic(replay, rounds=ROUNDS, warmup_rounds=WARMUPS)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median / LAUNCHES
    benchmark.extra_info.update(facts(layer, seconds, _ceilings(dtype)), config=str(config), dtype=str(dtype))


def facts(layer: Layer, seconds: float, limits: ceilings.Ceilings) -> dict[str, float]:
    """What a launch of ``layer`` in ``seconds`` amounts to."""
    bound = max(layer.flops / (limits.tflops * 1e12), layer.bytes / (limits.gb_per_s * 1e9))
    return {
        "us": seconds * 1e6,
        "tflops": layer.flops / seconds / 1e12,
        "gb_per_s": layer.bytes / seconds / 1e9,
        "roofline_share": bound / seconds,
    }


@functools.cache
def _ceilings(dtype: torch.dtype) -> ceilings.Ceilings:
    return ceilings.measure(torch.device("cuda", torch.cuda.current_device()), dtype)
