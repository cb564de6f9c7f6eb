"""Images in every dtype and memory format are read as torch's operators would read them, and NaN is noticed in all."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastres.bench.measure.calibration import pixels, smooth_images
from fastres.errors import OneDnnError
from fastres.executors import binding, direct, reading
from fastres.executors.binding import Binder
from fastres.executors.cpu import CpuExecutor, supported_dtypes
from fastres.executors.cpu_int8 import Int8Executor
from fastres.onednn import library
from fastres.onednn.library import Library
from fastres.onednn.loop import Execution, loop_over
from tests.executors.test_cpu_int8 import quantised
from tests.executors.test_direct import plan_of

pytestmark = pytest.mark.usefixtures("primitives")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
FORMATS = (torch.contiguous_format, torch.channels_last)
SHAPES = ((2, 48, 56), (1, 33, 47), (1, 32, 32))


def given(shape: tuple[int, int, int], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    x = smooth_images(*shape)
    x = pixels(x) if dtype == torch.uint8 else x.to(dtype)
    return x.contiguous(memory_format=memory_format)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_form_is_read_exactly(computed: torch.dtype, blocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if computed not in supported_dtypes():
        pytest.skip("this CPU does not compute in it")
    monkeypatch.setattr(direct, "is_faster_blocked", lambda *arguments: blocked)
    run = CpuExecutor(plan_of("resnet18", computed))
    for shape, dtype, memory_format in itertools.product(SHAPES, DTYPES, FORMATS):
        x = given(shape, dtype, memory_format)
        (expected,) = run.run(run.prepare(x, torch.channels_last))
        for _ in range(2):
            assert torch.equal(run.run(x)[0], expected), (shape, dtype, memory_format)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pixels_of_both_formats_are_normalised_alike(shape: tuple[int, int, int]) -> None:
    run = CpuExecutor(plan_of("resnet18"))
    one, other = (given(shape, torch.uint8, memory_format) for memory_format in FORMATS)
    found = run.normalised(other)
    assert torch.equal(run.normalised(one), found)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, (run._shift.double() + other * run._scale.double()).float(), rtol=0, atol=3e-7)


def executors() -> dict[str, CpuExecutor]:
    made = {"int8": Int8Executor(quantised("resnet18"))}
    plans = {dtype: plan_of("resnet18", dtype) for dtype in supported_dtypes()}
    return {**made, **{str(dtype): CpuExecutor(plan) for dtype, plan in plans.items()}}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_the_image_that_is_not_finite_is_named(value: float) -> None:
    for name, run in executors().items():
        for dtype, memory_format in itertools.product((torch.float32, torch.bfloat16, torch.float16), FORMATS):
            x = given((3, 48, 56), dtype, memory_format)
            clean = run.run(x)[0]
            assert clean.isfinite().all(), (name, dtype)
            for place in ((1, 0, 0, 0), (1, 2, 47, 55), (1, 1, 20, 31)):
                broken = x.clone()
                broken[place] = value
                found = run.run(broken)[0]
                assert found.isnan().all(1).tolist() == [False, True, False], (name, dtype, memory_format, place)
                assert torch.equal(found[::2], clean[::2])


def test_numbers_that_are_infinite_only_in_the_dtype_of_the_network_are_noticed() -> None:
    if torch.bfloat16 not in supported_dtypes():
        pytest.skip("this CPU does not compute in bfloat16")
    x = given((2, 48, 56), torch.float32, torch.contiguous_format)
    x[1, 0, 3, 3] = torch.finfo(torch.float32).max  # rounds to infinity
    assert CpuExecutor(plan_of("resnet18", torch.bfloat16)).run(x)[0].isnan().all(1).tolist() == [False, True]


def test_finite_numbers_with_an_infinite_sum_are_finite() -> None:
    run = CpuExecutor(plan_of("resnet18"))
    x = torch.zeros(1, 3, 48, 56)
    x[0, 0, 0, 0] = x[0, 0, 0, 1] = 3e38  # one row: its sum is infinite
    x[0, 1] = -x[0, 0]
    assert reading.guard_of(x) is None, "torch adds them in another order"
    assert not run.run(x)[0].isnan().any()


@pytest.mark.parametrize("machine_code", [True, False])
def test_a_primitive_that_fails_ends_the_run(machine_code: bool) -> None:
    binder, done = Binder(library.library(), 0, machine_code), list[int]()
    fails = Execution(0, 0, 0, 0)  # oneDNN refuses to run no primitive
    run = binder.routine([lambda: done.append(1), fails, lambda: done.append(2)])
    with pytest.raises(OneDnnError, match="dnnl_primitive_execute says 'invalid arguments'"):
        run()
    assert done == [1]


def test_a_primitive_without_memory_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "loop_over", lambda *arguments: lambda: 1)  # dnnl_out_of_memory
    with pytest.raises(MemoryError, match="dnnl_primitive_execute"):
        Binder(library.library(), 0).routine([Execution(0, 0, 0, 0)])()


def test_without_the_loop_the_logits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, plan = smooth_images(2, 64, 64), plan_of("resnet18")
    (expected,) = CpuExecutor(plan).run(x)
    asked: list[bool] = []

    def noted(library: Library, executions: list[Execution], machine_code: bool) -> Callable[[], int]:
        asked.append(machine_code)
        return loop_over(library, executions, machine_code)

    monkeypatch.setattr(binding, "loop_over", noted)
    run = CpuExecutor(plan)
    assert run.direct is not None
    run.direct.machine_code = False
    assert torch.equal(run.run(x)[0], expected)
    assert not any(asked)
