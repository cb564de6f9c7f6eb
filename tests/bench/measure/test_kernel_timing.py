"""Test what the kernel benchmarks check and count, and their expected results in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastres.bench.measure.kernel_timing import Layer, assert_right, conv_reduction, error_limit, facts, layers
from fastres.kernels.launch import INTERPRETED
from fastres.network.plan import Conv, Stem
from fastres.roofline.ceilings import Ceilings

FILES = Path(__file__).parents[3] / "bench" / "kernels"
HALF = torch.float16


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FILES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_distinct_layer_of_resnet50_is_there_once() -> None:
    found = layers("conv", 4, HALF)
    names = [str(layer) for layer in found]
    assert len(names) == len(set(names))
    sizes = {
        (
            layer.shape,
            tuple(layer.step.weight.shape),
            layer.step.stride,
            layer.step.residual is not None,
            layer.step.relu,
        )
        for layer in found
        if isinstance(layer.step, Conv)
    }
    assert len(sizes) == len(found)
    # Per stage: the first conv1, the other conv1, conv2 (with and without stride), conv3, the projection.
    assert len(found) == 5 + 3 * 6
    assert "56×56×64→256-1×1/1-residual-relu-N4" in names
    assert "14×14×256→256-3×3/1-relu-N4" in names
    assert [str(layer) for layer in layers("head", 1, HALF)] == ["7×7×2048→1000-average-pool,-linear-N1"]


def test_costs_are_the_layers_own() -> None:
    layer = next(layer for layer in layers("conv", 2, HALF) if str(layer).startswith("14×14×256→256-3×3"))
    assert layer.flops == 2 * (2 * 14 * 14) * 256 * (3 * 3 * 256)
    assert layer.bytes == 2 * (2 * 14 * 14 * 256) * 2 + (256 * 3 * 3 * 256) * 2 + 256 * 4
    assert conv_reduction(layer.step) == 3 * 3 * 256 + 1


def test_facts_of_a_launch() -> None:
    layer = Layer(layers("stem", 1, HALF)[0].step, (1, 224, 224, 3), flops=2_000_000, bytes=1_000_000)
    found = facts(layer, 10e-6, Ceilings(tflops=1.0, gb_per_s=200.0))  # at the ceilings: 2 µs against 5 µs
    assert found == pytest.approx({"us": 10.0, "tflops": 0.2, "gb_per_s": 100.0, "roofline_share": 0.5})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", [64, 4608])
def test_right_results_pass_and_wrong_ones_do_not(dtype: torch.dtype, reduction: int) -> None:
    exact = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_right(exact.to(dtype), exact, dtype, reduction)
    for wrong in (exact * (1 + 3 * error_limit(dtype, reduction)), exact.roll(1), exact * math.nan):
        with pytest.raises(AssertionError):
            assert_right(wrong.to(dtype), exact, dtype, reduction)
    poisoned = exact.to(dtype).index_fill(0, torch.tensor([5]), math.nan)
    with pytest.raises(AssertionError):
        assert_right(poisoned, exact, dtype, reduction)
    with pytest.raises(AssertionError):
        assert_right(exact[:1].to(dtype), exact, dtype, reduction)


@pytest.mark.parametrize("name", ["bench_conv", "bench_stem", "bench_head", "bench_conv_8bit", "bench_stem_8bit"])
def test_kernel_benchmarks_cover_both_batches(name: str) -> None:
    assert {layer.shape[0] for layer in load(name).LAYERS} >= {1, 32}


CPU = torch.device("cpu")
interpreted = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu


@interpreted
def test_conv_benchmarks_expect_what_the_kernel_computes() -> None:
    device = CPU if INTERPRETED else torch.device("cuda")
    small = layers("conv", 2, HALF, "resnet20", 32) if INTERPRETED else layers("conv", 2, HALF)
    kinds = {(layer.step.residual is not None, layer.step.relu) for layer in small if isinstance(layer.step, Conv)}
    assert kinds == {(False, True), (True, True), (False, False)}
    grouped = layers("conv", 1, HALF, "resnext50_32x4d", 32)[1]
    for layer in [*small, grouped]:
        run, y, expected = load("bench_conv").prepare(layer, HALF, device)
        assert y.isnan().all()
        run()
        assert_right(y, expected, HALF, conv_reduction(layer.step))


@interpreted
@pytest.mark.parametrize("raw", [True, False])
def test_stem_benchmarks_expect_what_the_kernel_computes(raw: bool) -> None:
    device = CPU if INTERPRETED else torch.device("cuda")
    layer = layers("stem", 2, HALF, size=48)[0]
    assert isinstance(layer.step, Stem)
    run, y, expected = load("bench_stem").prepare(layer, raw, HALF, device)
    run()
    assert_right(y, expected, HALF, conv_reduction(layer.step))


E4M3 = pytest.param(torch.float8_e4m3fn, marks=pytest.mark.skipif(INTERPRETED, reason="it rounds to e4m3 wrongly"))


@interpreted
@pytest.mark.parametrize("dtype", [torch.uint8, E4M3], ids=str)
def test_8_bit_benchmarks_expect_what_the_kernels_compute(dtype: torch.dtype) -> None:
    device = CPU if INTERPRETED else torch.device("cuda")
    small = layers("conv", 2, HALF, "resnet20", 32) if INTERPRETED else layers("conv", 2, HALF)
    grouped = layers("conv", 1, HALF, "resnext50_32x4d", 32)[1]
    problems = [load("bench_conv_8bit").prepare(layer, dtype, device) for layer in [*small[:3], *small[-2:], grouped]]
    stem = layers("stem", 2, HALF, size=48)[0]
    problems += [load("bench_stem_8bit").prepare(stem, raw, dtype, device) for raw in (True, False)]
    for problem in problems:
        with pytest.raises(AssertionError, match="relative error"):
            problem.assert_right()
        problem.run()
        problem.assert_right()
        if dtype == torch.uint8:
            problem.y.add_(1)
            with pytest.raises(AssertionError, match="relative error"):
                problem.assert_right()


@interpreted
def test_head_benchmarks_expect_what_the_kernels_compute() -> None:
    device = CPU if INTERPRETED else torch.device("cuda")
    module = load("bench_head")
    layer = layers("head", 2, HALF, "resnet18", 64)[0]
    run, y, expected = module.prepare_pool(layer, HALF, device)
    run()
    assert_right(y, expected, HALF, 4)
    run, y, expected = module.prepare_linear(layer, HALF, device)
    run()
    assert y.dtype == torch.float32
    assert_right(y, expected, torch.float32, 512)


def test_the_heads_cost_is_shared_out_between_its_kernels() -> None:
    module = load("bench_head")
    layer = layers("head", 2, HALF)[0]
    pool, linear = module.parts(layer)
    between = 2 * 2048 * 2  # the pooled features, which the pool writes and the classifier reads
    assert pool.bytes + linear.bytes == layer.bytes + 2 * between
    assert linear.flops == layer.flops == 2 * 2 * 2048 * 1000
    assert replace(pool, flops=0, bytes=0) == replace(layer, flops=0, bytes=0)
