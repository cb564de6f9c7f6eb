"""The CPU executor of plans in 8 bit: every step against integer arithmetic, and what surrounds the steps."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from fastres.errors import Int8Warning
from fastres.executors import cpu_int8
from fastres.executors.cpu import CpuExecutor, micro_batch
from fastres.executors.cpu_int8 import Int8Executor, first_stages
from fastres.executors.int8_steps import Int8Conv, Int8Product, limited, saturates, speedup
from fastres.executors.reference import ReferenceExecutor
from fastres.folding.build import build_plan, outline
from fastres.network.architectures import get_architecture
from fastres.network.plan import INPUT, LOGITS, POOLED, Conv, Plan
from fastres.network.quantisation import WEIGHT_LIMIT_WITHOUT_VNNI
from fastres.quantisation.rounding import quantisable, quantise_plan
from tests.executors.test_cpu import VIEWS
from tests.measures import relative_error
from tests.quantisation.simple import scales_of

pytestmark = pytest.mark.usefixtures("way")

NETWORKS = ("resnet18", "resnet50", "resnext50_32x4d", "resnet26d", "seresnet50", "plain18", "resnet20")


@functools.lru_cache(maxsize=2)
def float_plan(name: str) -> Plan:
    network = calibrated(get_architecture(name))
    return build_plan(network.state_dict(), network.architecture)


def quantised(name: str, keep: Sequence[str] = ()) -> Plan:
    plan = float_plan(name)
    return quantise_plan(plan, scales_of(plan, pixels(smooth_images(2, 65, 81, seed=1))), keep)


def check_steps(run: Int8Executor, x: Tensor) -> None:
    """Compare every step with the reference, on the executor's own inputs."""
    plan = run._plan
    names = [name for step in plan for name in step.writes]
    results = dict(zip(names, run.run(x, names), strict=True))
    values = {INPUT: x, **{name: levels(run, name, value) for name, value in results.items()}}
    for step in plan:
        expected, found = ReferenceExecutor(plan)._step(step, values)[step.output], values[step.output]
        if expected.dtype == torch.uint8:
            assert found.dtype == torch.uint8
            off = (expected.int() - found.int()).abs()
            assert int(off.amax()) <= 1, step.name
            assert float((off > 0).double().mean()) < 1e-3, step.name
        else:
            assert relative_error(found, expected) < 1e-5


def levels(run: Int8Executor, name: str, value: Tensor) -> Tensor:
    """Return a value of the executor, NHWC, as the reference has it: in levels, or in float64."""
    value = value.permute(0, 2, 3, 1).double() if value.dim() == 4 else value.double()
    scale = run._scales.get(name)
    return value if scale is None else (value / scale.scale + scale.zero_point).round().to(torch.uint8)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_step_is_integer_arithmetic(name: str, batch: int) -> None:
    check_steps(Int8Executor(quantised(name)), pixels(smooth_images(batch, 64, 75, seed=batch)))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "seresnet50"])
def test_steps_that_stay_in_float(name: str) -> None:
    names = quantisable(float_plan(name))
    x = smooth_images(2, 64, 64, seed=4)
    for keep in (names[:1], names[-1:], names[1:4], names[-4:-1], names[::2], names[1::3], names):
        plan = quantised(name, keep)
        run = Int8Executor(plan)
        assert plan.quantisation is not None
        assert set(plan.quantisation.weights) == set(names) - set(keep)
        check_steps(run, x)
    assert relative_error(run.run(x)[0], CpuExecutor(float_plan(name)).run(x)[0]) < 1e-5, "all steps are in float"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_normalised_pixels_give_the_same_result_as_pixels(layout: torch.memory_format, dtype: torch.dtype) -> None:
    run = Int8Executor(quantised("resnet18"))
    x = pixels(smooth_images(2, 64, 75, seed=5))
    mean, std = (
        torch.tensor(v, dtype=torch.float32, device="cpu").view(1, 3, 1, 1)
        for v in (run._plan.stem.mean, run._plan.stem.std)
    )
    given = ((x / 255 - mean) / std).to(dtype).to(memory_format=layout)
    if dtype == torch.bfloat16:  # has not enough digits for every pixel
        x = ReferenceExecutor(run._plan)._step(run._plan.stem, {INPUT: given})["stem"].permute(0, 3, 1, 2)
        found = run._stem(run._plan.stem, given, run._packed.of((2, 64, 75, 3))["stem"])
        assert int((found.int() - x.int()).abs().amax()) <= 1
    else:
        assert torch.equal(run.run(given)[0], run.run(x.to(memory_format=layout))[0])


@pytest.mark.parametrize("keep", [(), ("stem",)], ids=["stem in 8 bit", "stem in float"])
@pytest.mark.parametrize("view", VIEWS)
def test_images_with_any_strides(view: str, keep: tuple[str, ...]) -> None:
    run = Int8Executor(quantised("resnet18", keep=keep))
    x = smooth_images(2, 80, 80)
    for given in (x, pixels(x)):
        viewed = VIEWS[view](given)
        assert torch.equal(run.run(viewed)[0], run.run(viewed.clone(memory_format=torch.contiguous_format))[0])


def test_values_outside_the_pixels_are_clipped() -> None:
    run = Int8Executor(quantised("resnet18"))
    bright = torch.full((1, 3, 64, 64), 1e4, dtype=torch.float32, device="cpu")
    white = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8, device="cpu")
    assert torch.equal(run.run(bright)[0], run.run(white)[0])


@pytest.mark.usefixtures("operators")
def test_large_batches_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Int8Executor(quantised("resnet50"))
    x = pixels(smooth_images(7, 64, 64, seed=6))
    (expected,) = run.run(x)
    sizes = []
    run_step = run.run_step

    def counted(step, values, *rest):  # type: ignore[no-untyped-def]
        sizes.append((step.name, values[step.input].shape[0]))
        run_step(step, values, *rest)

    monkeypatch.setattr(run, "run_step", counted)
    monkeypatch.setattr(cpu_int8, "PART_BYTES", 2 * 64 * 32 * 32)
    monkeypatch.setattr(cpu_int8, "has_amx", lambda: False)
    run._parts.clear()
    (found,) = run.run(x)
    assert [n for name, n in sizes if name == "stem"] == [2, 2, 2, 1]
    assert [n for name, n in sizes if name == "layer4.0.conv1"] == [7]
    assert relative_error(found, expected) < 0.1, "only ties may be rounded the other way"
    assert torch.equal(found.argmax(1), expected.argmax(1))


def test_micro_batches_count_a_byte_for_each_value() -> None:
    run, shape = Int8Executor(quantised("resnet50")), (64, 224, 224, 3)
    assert run._micro_batch(shape) == micro_batch(run._plan, shape, torch.uint8) == 32
    assert micro_batch(run._plan, shape, torch.float32) == 10, "the float network runs fewer images at once"


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet50d", "seresnet50", "wide_resnet50_2", "plain34"])
@pytest.mark.parametrize("amx", [False, True])
def test_parts_end_where_one_value_is_needed(monkeypatch: pytest.MonkeyPatch, name: str, amx: bool) -> None:
    monkeypatch.setattr(cpu_int8, "has_amx", lambda: amx)
    plan = outline(get_architecture(name), torch.float32)
    for batch in (1, 3, 8, 33):
        end, images = first_stages(plan, (batch, 224, 224, 3))
        assert end > 0
        assert 1 <= images <= min(batch, 16 if amx else 5)
        assert images == batch or images >= (4 if amx else 1)
        later = {value for step in plan.steps[end:] for value in step.reads}
        earlier = {step.output for step in plan.steps[: end - 1]}
        assert not later & earlier


def test_requested_values_are_not_overwritten() -> None:
    run = Int8Executor(quantised("resnet50"))
    x = pixels(smooth_images(2, 64, 64, seed=7))
    values = [value for value in run._scales if value not in (INPUT, POOLED)]
    together = run.run(x, values)
    for name, value in zip(values, together, strict=True):
        (alone,) = run.run(x, (name,))
        assert torch.equal(alone, value), name
        assert value.dtype == torch.float32
    pooled, logits = run.run(x, (POOLED, LOGITS))
    assert pooled.shape == (2, 2048)
    assert torch.equal(logits, run.run(x)[0])
    assert relative_error(pooled, together[-1].mean((2, 3))) < 1e-6


def test_images_that_are_not_finite_have_no_numbers() -> None:
    run = Int8Executor(quantised("resnet18"))
    x = smooth_images(3, 64, 64, seed=8)
    x[1, 2, 3, 4] = float("nan")
    (logits,) = run.run(x)
    assert logits.isnan().all(1).tolist() == [False, True, False]


def test_weights_that_are_not_finite_give_no_numbers() -> None:
    plan = quantised("resnet18")
    assert plan.quantisation is not None
    plan.quantisation.weights["layer1.0.conv1"][3] = float("inf")
    assert Int8Executor(plan).run(smooth_images(1, 64, 64))[0].isnan().all()


def test_smaller_weights_do_not_saturate() -> None:
    plan = limited(quantised("resnet50"), WEIGHT_LIMIT_WITHOUT_VNNI)
    assert plan.quantisation is not None
    for step in plan:
        if step.name in plan.quantisation.weights:
            assert int(step.weight.abs().amax()) == WEIGHT_LIMIT_WITHOUT_VNNI
    check_steps(Int8Executor(plan), pixels(smooth_images(1, 64, 64, seed=9)))
    grey = torch.full((1, 3, 40, 40), 0.0, dtype=torch.float32, device="cpu")
    before, after = (ReferenceExecutor(p).values(grey, ("stem",))["stem"] for p in (quantised("resnet50"), plan))
    assert int((before.int() - after.int()).abs().amax()) <= 2


def test_the_executor_limits_weights_where_they_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = quantised("resnet18")
    monkeypatch.setattr(cpu_int8, "speedup", lambda threads: 1.5)
    monkeypatch.setattr(cpu_int8, "saturates", lambda: True)
    with pytest.warns(Int8Warning, match="rounded to 7 bits"):
        fitted = Int8Executor(plan)._plan
    assert all(int(s.weight.abs().amax()) <= 64 for s in fitted if isinstance(s, Conv))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Int8Executor(fitted)._plan is fitted
        monkeypatch.setattr(cpu_int8, "saturates", lambda: False)
        assert Int8Executor(plan)._plan is plan


def test_a_processor_that_is_slower_in_8_bit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_int8, "speedup", lambda threads: 0.5)
    with pytest.warns(Int8Warning, match=r"2\.0 times as long as in float32"):
        Int8Executor(quantised("resnet18"))


def test_the_speedup_is_measured() -> None:
    assert speedup(torch.get_num_threads()) > 0


def test_saturation_is_tried_out() -> None:
    limits = torch.backends.cpu.get_cpu_capability()
    if limits == "AVX2":
        pytest.skip("AVX2 with and without VNNI have the same name")
    assert saturates() is (not torch.cpu._is_vnni_supported())


@pytest.mark.usefixtures("operators")
def test_one_by_one_convolutions_are_products() -> None:
    run = Int8Executor(quantised("resnet50"))
    small, large = run._packed.of((1, 64, 64, 3)), run._packed.of((64, 224, 224, 3))
    assert isinstance(small["layer2.1.conv1"], Int8Product)
    assert isinstance(large["layer2.1.conv1"], Int8Conv)
    assert isinstance(large["layer2.1.conv3"], Int8Product), "a residual would be copied"
    for packed in (small, large):
        assert isinstance(packed["layer2.0.downsample"], Int8Conv), "stride 2"
        assert isinstance(packed["layer2.1.conv2"], Int8Conv)


def test_autocast_changes_nothing() -> None:
    run = Int8Executor(quantised("resnet18", ["layer1.0.conv1"]))
    x = smooth_images(1, 64, 64)
    (expected,) = run.run(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run.run(x)[0], expected)
