"""The measures themselves, on any processor: correct results pass them, wrong ones do not.

Low precision is emulated in float32: the weights and the result of every step are rounded to the dtype. So the results
of a processor with bfloat16 or float16 can be tested on one that has neither.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastres.bench.measure.calibration import calibrated, smooth_images
from fastres.bench.measure.rounding import float32_sums, sum_error
from fastres.export.verification import widened
from fastres.folding.build import build_plan
from fastres.network.architectures import get_architecture
from fastres.network.plan import Conv, Plan
from tests.network.reference_plan import run_plan

from .measures import Yardstick, relative_error

HALVES = [torch.bfloat16, torch.float16]
NAMES = ["resnet18", "resnet20"]


@functools.cache
def yardstick(name: str) -> tuple[nn.Module, Yardstick]:
    module = calibrated(get_architecture(name))
    size = 32 if name == "resnet20" else 64
    return module, Yardstick(module, *(smooth_images(4, size, size + 8 * i, seed=i) for i in range(4)))


def plan_of(name: str, dtype: torch.dtype = torch.float32) -> Plan:
    return widened(build_plan(yardstick(name)[0].state_dict(), get_architecture(name), dtype=dtype))


def emulated(plan: Plan, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def rounded(value: Tensor) -> Tensor:
        return value.to(dtype).float()

    return lambda x: run_plan(plan, rounded(x), rounded)["logits"]


def with_step(plan: Plan, index: int, change: Callable[[Conv], Conv]) -> Plan:
    """Return ``plan`` with its ``index``-th convolution changed."""
    convs = [step for step in plan.steps if isinstance(step, Conv)]
    steps = tuple(change(step) if step is convs[index] else step for step in plan.steps)
    return replace(plan, steps=steps)


FAULTS: dict[str, Callable[[Plan], Plan]] = {
    "a residual left out": lambda plan: with_step(plan, 1, lambda step: replace(step, residual=None)),
    "a ReLU left out": lambda plan: with_step(plan, 0, lambda step: replace(step, relu=False)),
    "a filter turned": lambda plan: with_step(plan, 0, lambda step: replace(step, weight=step.weight.flip(1))),
    "a bias left out": lambda plan: with_step(plan, 1, lambda step: replace(step, bias=torch.zeros_like(step.bias))),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_low_precision_emulated_is_right(name: str, dtype: torch.dtype) -> None:
    yardstick(name)[1].check(emulated(plan_of(name, dtype), dtype), dtype)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_faults_are_seen(fault: str, dtype: torch.dtype) -> None:
    plan = FAULTS[fault](plan_of("resnet18", dtype))
    with pytest.raises(AssertionError, match="error, limit"):
        yardstick("resnet18")[1].check(emulated(plan, dtype), dtype)


def test_a_coarser_dtype_is_seen() -> None:
    """Tests bfloat16 instead of float16, float16 instead of float32, and products in TF32."""
    measure = yardstick("resnet18")[1]
    for coarse, asked in ((torch.bfloat16, torch.float16), (torch.float16, torch.float32)):
        with pytest.raises(AssertionError, match="error, limit"):
            measure.check(emulated(plan_of("resnet18", coarse), asked), asked)

    def tf32(value: Tensor) -> Tensor:
        bits = value.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    plan = plan_of("resnet18")
    with pytest.raises(AssertionError, match="error, limit"):
        measure.check(lambda x: run_plan(plan, x, tf32)["logits"])


def test_one_wrong_batch_and_nan_are_seen() -> None:
    module, measure = yardstick("resnet18")
    last = measure.inputs[-1]
    with torch.no_grad():
        measure.check(module)
        for wrong in (1.001, float("nan"), float("inf")):
            with pytest.raises(AssertionError, match="error, limit"):
                measure.check(lambda x, wrong=wrong: module(x) * (wrong if x is last else 1))


def test_the_truth_is_the_checkpoint_and_not_its_rounded_weights() -> None:
    """If the truth had rounded weights, part of eager's error would not count, while that of others would."""
    module, measure = yardstick("resnet18")
    with torch.no_grad():
        rounded = calibrated(get_architecture("resnet18")).bfloat16().double()(measure.inputs[0].double())
    forgiven = relative_error(rounded, measure.truth[0]["logits"])
    assert forgiven > 0.3 * measure.eager(torch.bfloat16)["logits"]
    assert next(module.parameters()).dtype == torch.float32


def test_the_bound_of_float32_sums_is_theirs() -> None:
    """Products added one after another, as in a kernel with one accumulator, have the error that the bound expects."""
    for products in (64, 576, 4608):
        values = torch.randn(products, 4000, generator=torch.Generator().manual_seed(products))
        total = torch.zeros(4000)
        for value in values:
            total += value
        found = relative_error(total, values.double().sum(0))
        assert 0.4 < found / sum_error(products) < 1.2


def test_the_bound_is_the_same_each_time_and_leaves_the_network_alone() -> None:
    network = calibrated(get_architecture("resnet20")).double()
    x = smooth_images(2, 32, 32).double()
    with torch.no_grad():
        exact = network(x)
        noisy = []
        for _ in range(2):
            with float32_sums(network):
                noisy.append(network(x))
        assert torch.equal(network(x), exact)
    assert torch.equal(noisy[0], noisy[1])
    assert 1e-8 < relative_error(noisy[0], exact) < 1e-5
