"""Shared parts of the kernel benchmarks in ``bench/kernels``: layers, the correctness limit and timing on the GPU.

A launch can take longer on the host than the kernel takes on the GPU. Therefore, several launches are captured in one
CUDA graph, and the graph is timed. All launches use the same tensors, so data that fits in the L2 cache stays there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastres.folding.build import outline
from fastres.network.architectures import get_architecture
from fastres.network.plan import Conv, Shape, Step, describe

from . import ceilings
from .timing import captured

LAUNCHES = 20  # in one graph: the 10 µs to start the graph then add only 0.5 µs per launch
ROUNDS, WARMUPS = 30, 5
SEED = 0


@dataclass(frozen=True)
class Layer:
    """A step of a plan with the shape of its input (NHWC), its FLOPs and its minimum memory traffic in bytes."""

    step: Step
    shape: Shape
    flops: int
    bytes: int

    def __str__(self) -> str:
        """Return an identifier such as ``56×56×64→256-1×1/1-residual-relu-N32``."""
        n, h, w, c = self.shape
        words = describe(self.step).replace("+ ", "").replace(" ", "-")
        return f"{h}×{w}×{c}→{self.step.weight.shape[0]}-{words}-N{n}"


def layers(kind: str, batch: int, dtype: torch.dtype, model: str = "resnet50", size: int = 224) -> list[Layer]:
    """Return the distinct steps of ``kind`` (``"stem"``, ``"conv"``, ``"head"``). Their weights hold no data."""
    plan = outline(get_architecture(model), dtype)
    found: dict[str, Layer] = {}
    for step, cost in zip(plan, plan.costs(batch, size, size, dtype), strict=True):
        if step.kind == kind:
            layer = Layer(step, cost.input_shape, cost.flops, cost.bytes)
            found.setdefault(str(layer), layer)
    return list(found.values())


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    """Return normal random numbers times ``scale``. The same shape gives the same numbers."""
    generator = torch.Generator(device).manual_seed(SEED + math.prod(shape))
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)


def draw_parameters(step: Step, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a random weight that keeps activations at unit variance, and a random bias, for ``step``."""
    fan = step.weight[0].numel()
    weight = draw(tuple(step.weight.shape), dtype, device, (2 / fan) ** 0.5)
    return weight, draw(tuple(step.bias.shape), torch.float32, device, 0.5)


def error_limit(dtype: torch.dtype, reduction: int) -> float:
    """Return the largest accepted relative L2 error of a sum of ``reduction`` products.

    The sum is accumulated in float32 and stored in ``dtype``. Rounding the result costs at most half an epsilon.
    Rounding errors of the sum grow like a random walk. However, tensor cores truncate towards zero each time they add a
    step of 16 or more products.
    """
    return torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps * (2 * reduction**0.5 + reduction / 16)


def assert_right(found: Tensor, expected: Tensor, dtype: torch.dtype, reduction: int) -> None:
    """Assert that ``found`` matches the float64 ``expected``, so that wrong kernels are not timed. NaN fails."""
    assert found.shape == expected.shape
    assert expected.dtype == torch.float64
    error = float((found.double() - expected).norm() / expected.norm())
    assert error <= error_limit(dtype, reduction), f"relative error {error:.2e}, not timed"


def conv_reduction(step: Step) -> int:
    """Return the number of terms summed for one output, including the bias and the residual."""
    return step.weight[0].numel() + 1 + (isinstance(step, Conv) and step.residual is not None)


def time_kernel(benchmark: Any, launch: Callable[[], object], layer: Layer, dtype: torch.dtype, config: object) -> None:
    """Time ``launch`` with pytest-benchmark, and record microseconds, TFLOP/s, GB/s and the share of the roofline.

    pytest-benchmark's own table shows graphs of ``LAUNCHES`` launches; ``extra_info`` holds the values of one launch.
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
    """Return the rates and the roofline share of a launch of ``layer`` that takes ``seconds``."""
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
