"""The convolution with specialised warps: on a GPU of the sm_90 family, and elsewhere in a simulation of Gluon."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastres.errors import KernelError
from fastres.kernels import conv_specialized, dispatch, reference
from fastres.kernels.conv_specialized import (
    CANDIDATES,
    KERNELS,
    box_of,
    conv_specialized_into,
    why_not_conv_specialized,
)
from fastres.kernels.conv_specialized import conv_specialized as conv_specialized_checked
from fastres.kernels.launch import INTERPRETED
from fastres.kernels.routing.cards import A100, H100, INTERPRETER, Gpu
from fastres.kernels.routing.rules import ConvConfig, ConvShape
from tests.measures import kernel_tolerance, relative_error
from tests.subjects import HOPPER

from .gluon_simulator import Deadlock, Simulator

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Gluon has no interpreter; the simulation needs none")
THREE = Gpu("three multiprocessors", "sm_90", 3, H100.shared_memory)
SMALL = ConvConfig("conv_specialized", 32, 64, 64, 8, 2)


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Simulator:
    from fastres.kernels import conv_specialized_gluon as device

    made = Simulator(device, monkeypatch)
    monkeypatch.setattr(device, "conv_specialized_kernel", made.launch(device.conv_specialized_kernel))
    monkeypatch.setattr(conv_specialized, "gpu_of", lambda _device: THREE)
    return made


# N, H, W, C, K, R, S, stride, padding
SHAPES = {
    "3x3": (3, 6, 5, 64, 72, 3, 3, 1, 1),
    "3x3 stride 2": (2, 8, 6, 64, 64, 3, 3, 2, 1),
    "3x3 of 128 channels": (2, 4, 4, 128, 136, 3, 3, 1, 1),
    "1x1": (5, 3, 3, 64, 64, 1, 1, 1, 0),
    "1x1 stride 2": (4, 4, 6, 128, 64, 1, 1, 2, 0),
    "5x3 without padding": (1, 9, 7, 64, 64, 5, 3, 1, 0),
    "7x7 stride 2": (1, 10, 12, 64, 64, 7, 7, 2, 3),
    "one pixel": (40, 1, 1, 64, 64, 3, 3, 1, 1),
}


def tensors(shape: ConvShape, residual: bool, device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    x = normal(shape.N, shape.H, shape.W, shape.C).to(device, dtype)
    scale = (shape.R * shape.S * shape.C) ** -0.5
    weight = (normal(shape.K, shape.R, shape.S, shape.C) * scale).to(device, dtype)
    added = normal(shape.N, shape.P, shape.Q, shape.K).to(device, dtype) if residual else None
    return x, weight, normal(shape.K).to(device), added


def error(shape: ConvShape, config: ConvConfig, residual: bool, device: str, dtype: torch.dtype) -> float:
    """Return the kernel's error compared with float64. The result overwrites the residual's tensor."""
    x, weight, bias, added = tensors(shape, residual, device, dtype)
    settings: dict[str, Any] = {"stride": shape.stride, "padding": shape.padding, "relu": True}
    exact = reference.conv2d(
        x.double(), weight.double(), bias.double(), None if added is None else added.double(), **settings
    )
    y = torch.full((shape.N, shape.P, shape.Q, shape.K), torch.nan, dtype=dtype, device=device)
    y = y if added is None else added
    conv_specialized_into(
        y, x, weight.flatten(1), bias, added, filter_size=(shape.R, shape.S), **settings, config=config
    )
    return relative_error(y, exact)


def limit(shape: ConvShape, dtype: torch.dtype) -> float:
    return kernel_tolerance(dtype, shape.R * shape.S * shape.C)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", SHAPES)
def test_simulated(simulator: Simulator, name: str, kernel: str, residual: bool) -> None:
    shape = ConvShape(*SHAPES[name])
    found = error(shape, replace(SMALL, kernel=kernel), residual, "cpu", torch.float16)
    assert found < limit(shape, torch.float16)


@pytest.mark.parametrize("stages", [3, 7])
def test_simulated_with_any_number_of_buffers(simulator: Simulator, stages: int) -> None:
    shape = ConvShape(*SHAPES["3x3"])
    assert error(shape, replace(SMALL, num_stages=stages), True, "cpu", torch.bfloat16) < limit(shape, torch.bfloat16)


def test_simulated_behind_the_one_call(simulator: Simulator) -> None:
    shape = ConvShape(*SHAPES["3x3 stride 2"])
    x, weight, bias, added = tensors(shape, True, "cpu", torch.float16)
    expected = reference.conv2d(x.double(), weight.double(), bias, added.double(), stride=2, padding=1, relu=True)
    dispatch.convolve_into(added, x, weight, bias, added, stride=2, padding=1, relu=True, config=SMALL)
    assert relative_error(added, expected) < limit(shape, torch.float16)


def test_nan_in_the_image_is_kept(simulator: Simulator) -> None:
    shape = ConvShape(*SHAPES["1x1"])
    x, weight, bias, _ = tensors(shape, False, "cpu", torch.float16)
    x[1, 2, 0, 5] = torch.nan
    y = x.new_empty(shape.N, shape.P, shape.Q, shape.K)
    conv_specialized_into(y, x, weight.flatten(1), bias, filter_size=(1, 1), relu=True, config=SMALL)
    broken = y.isnan().all(3)
    assert broken[1, 2, 0]
    assert broken.sum() == 1
    assert y.isnan().sum() == shape.K


def test_the_simulation_sees_a_buffer_that_is_handed_back_too_early(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastres.kernels import conv_specialized_gluon as device

    wait = device.warpgroup_mma_wait

    def late(num_outstanding: int, deps: Any) -> Any:
        return deps[0] if num_outstanding else wait(0, deps)

    monkeypatch.setattr(device, "warpgroup_mma_wait", late)
    shape = ConvShape(*SHAPES["3x3"])
    assert not error(shape, SMALL, False, "cpu", torch.float16) < limit(shape, torch.float16)


def test_the_simulation_sees_a_missing_hand_over(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.kernels.gluon_simulator.PATIENCE_S", 0.5)
    simulator.mbarrier.arrive = lambda barrier, count: None
    with pytest.raises(Deadlock):
        error(ConvShape(*SHAPES["3x3"]), SMALL, False, "cpu", torch.float16)


def test_boxes_cover_the_tile_with_few_products() -> None:
    large = ConvShape(256, 14, 14, 256, 256, 3, 3, 1, 1)
    assert box_of(large, 128) == (128, 1, 1), (
        "filter positions outside the image are left out for every pixel at the edge"
    )
    assert box_of(large, 128, "conv_specialized_compact") == (32, 2, 2)
    assert box_of(replace(large, N=1), 128) == (1, 8, 16)


@pytest.mark.parametrize(
    ("changes", "gpu", "dtype", "reason"),
    [
        ({"groups": 2}, H100, torch.float16, "no groups"),
        ({"padding": 3}, H100, torch.float16, "must be smaller than"),
        ({"stride": 3}, H100, torch.float16, "stride 1, or 2"),
        ({"stride": 2, "H": 15}, H100, torch.float16, "on even sizes"),
        ({"C": 96}, H100, torch.float16, "multiples of 64 input channels, not 96"),
        ({"K": 100}, H100, torch.float16, "divisible by 8"),
        ({"H": 7, "W": 7, "N": 1}, H100, torch.float16, "mostly empty"),
        ({}, A100, torch.float16, "sm_90"),
        ({}, H100, torch.float32, "float16 and bfloat16"),
        ({}, INTERPRETER, torch.float16, "does not run Gluon"),
    ],
)
def test_says_why_it_does_not_take_a_layer(changes: dict[str, int], gpu: Gpu, dtype: torch.dtype, reason: str) -> None:
    shape = ConvShape(256, 14, 14, 256, 256, 3, 3, 1, 1)
    assert not why_not_conv_specialized(shape, torch.float16, H100)
    assert reason in why_not_conv_specialized(replace(shape, **changes), dtype, gpu)


def test_a_float32_output_of_half_precision_is_refused() -> None:
    """The rows of its boxes would be wider than the 128 bytes that TMA swizzles."""
    classifier = ConvShape(256, 1, 1, 2048, 1000, 1, 1, 1, 0)
    assert not why_not_conv_specialized(classifier, torch.float16, H100, torch.float16)
    assert "writes the dtype that it reads, float16, not float32" in why_not_conv_specialized(
        classifier, torch.float16, H100, torch.float32
    )


def test_another_gluon_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastres.kernels.conv_specialized_gluon", None)
    monkeypatch.delattr("fastres.kernels.conv_specialized_gluon", raising=False)
    conv_specialized.why_no_gluon.cache_clear()
    try:
        assert "does not support the version of Gluon" in conv_specialized.why_no_gluon()
    finally:
        conv_specialized.why_no_gluon.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="written for sm_90")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_on_a_gpu(config: ConvConfig, residual: bool, dtype: torch.dtype) -> None:
    for shape in (
        ConvShape(130, 14, 14, 128, 256, 3, 3, 1, 1),
        ConvShape(64, 28, 28, 64, 72, 3, 3, 2, 1),
        ConvShape(40, 7, 7, 512, 136, 3, 3, 1, 1),
        ConvShape(9, 56, 56, 64, 256, 1, 1, 1, 0),
    ):
        assert error(shape, config, residual, "cuda", dtype) < limit(shape, dtype), shape


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="written for sm_90")
def test_what_it_does_not_take_is_an_error() -> None:
    shape = ConvShape(8, 7, 7, 64, 64, 3, 3, 1, 1)
    x, weight, bias, _ = tensors(shape, False, "cuda", torch.float16)
    settings: dict[str, Any] = {"filter_size": (3, 3), "padding": 1, "config": CANDIDATES[0]}
    with pytest.raises(KernelError, match="stride 3"):
        conv_specialized_checked(x, weight.flatten(1), bias, stride=3, **settings)
    with pytest.raises(KernelError, match="must be"):
        conv_specialized_checked(x, weight.flatten(1)[:, :64], bias, **settings)
    assert conv_specialized_checked(x, weight.flatten(1), bias, **settings).shape == (8, 7, 7, 64)
