"""Activations in blocks of channels: which networks and images have them, how exact they are, and which primitives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastres.bench.measure.calibration import calibrated, smooth_images
from fastres.executors import direct
from fastres.executors.cpu import CpuExecutor
from fastres.executors.direct_runs import Prepared
from fastres.executors.layouts import can_be_blocked, is_faster_blocked
from fastres.network.architectures import get_architecture
from fastres.network.plan import LOGITS, POOLED, Conv
from fastres.onednn.library import library
from fastres.onednn.primitives import Builder
from tests.executors.test_cpu import images, logits_of
from tests.executors.test_cpu_int8 import quantised
from tests.executors.test_direct import plan_of, through_operators
from tests.measures import Yardstick, relative_error

pytestmark = pytest.mark.usefixtures("primitives")

BLOCKED = ("resnet18", "resnet50", "wide_resnet50_2", "resnet26d", "plain18", "resnet20")


def prepared_by(run: CpuExecutor) -> Prepared:
    assert run.direct is not None
    (prepared,) = run.direct.kept.values()
    return prepared


def needs_lanes() -> int:
    lanes = library().lanes
    if lanes is None:
        pytest.skip("blocks are the vectors of AVX2 or AVX-512")
    return lanes


@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize("shape", [(2, 64, 64, 3), (2, 75, 97, 3), (8, 224, 224, 3), (1, 448, 448, 3)], ids=str)
def test_no_step_of_a_blocked_network_is_slow(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = needs_lanes()
    monkeypatch.setattr(direct, "is_faster_blocked", lambda *arguments: True)
    run = CpuExecutor(plan_of(name))
    assert run.direct is not None
    prepared = run.direct.prepared_for(shape, (LOGITS,))
    assert prepared.channels == lanes
    for part in prepared.parts:
        for operation in part.operations:
            assert operation.implementation, part.step.name
            assert not operation.is_slow, (part.step.name, operation.implementation)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet26d", "resnet20"])
def test_blocks_are_as_exact_as_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_lanes()
    monkeypatch.setattr(direct, "is_faster_blocked", lambda *arguments: True)
    run = CpuExecutor(plan_of(name))
    given = images([(1, 64, 64), (3, 75, 97), (2, 32, 33)])
    Yardstick(calibrated(get_architecture(name)), *given).check(logits_of(run))
    assert run.direct is not None
    assert all(prepared.channels for prepared in run.direct.kept.values())


def test_only_networks_with_fast_primitives_are_blocked() -> None:
    lanes = 16
    assert all(can_be_blocked(plan_of(name), lanes) for name in BLOCKED)
    for name, reason in {
        "resnext50_32x4d": "groups",
        "seresnet50": "torch's operators squeeze",
    }.items():
        assert not can_be_blocked(plan_of(name), lanes), reason
    assert not can_be_blocked(plan_of("resnet18", torch.bfloat16), lanes)
    assert not can_be_blocked(quantised("resnet18"), lanes)
    assert not can_be_blocked(plan_of("resnet18"), None), "a processor without AVX2"
    plan = plan_of("resnet50")
    odd = [replace(step, weight=step.weight[:-1]) if isinstance(step, Conv) else step for step in plan]
    assert not can_be_blocked(replace(plan, steps=tuple(odd)), lanes), "channels that fill no block"


def test_large_images_alone_are_channels_last_with_avx_512() -> None:
    assert not is_faster_blocked((1, 224, 224, 3), 16, 2048)
    assert is_faster_blocked((1, 224, 224, 3), 8, 2048)
    assert is_faster_blocked((1, 160, 160, 3), 16, 2048)
    assert is_faster_blocked((2, 224, 224, 3), 16, 2048)


def test_narrow_networks_are_blocked_for_small_batches_with_avx_512() -> None:
    assert is_faster_blocked((2, 32, 32, 3), 16, 64)
    assert not is_faster_blocked((4, 32, 32, 3), 16, 64)
    assert not is_faster_blocked((1, 32, 32, 3), 8, 64)


def test_a_slow_primitive_makes_the_network_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_lanes()
    name = Builder._implementation
    blocked = []

    def without_fast_blocks(builder: Builder, description: object) -> str:
        if builder._block is None:
            return name(builder, description)  # type: ignore[arg-type]
        blocked.append(description)
        return "ref:any"

    monkeypatch.setattr(Builder, "_implementation", without_fast_blocks)
    plan, x = plan_of("resnet18"), smooth_images(2, 64, 64)
    run = CpuExecutor(plan)
    assert relative_error(run.run(x)[0], through_operators(plan).run(x)[0]) < 1e-5
    assert blocked
    assert prepared_by(run).channels is None
    assert run.direct is not None
    kept = {id(packed) for packed in prepared_by(run).weights}
    assert {id(packed) for known in run.direct._known.values() for packed in known} == kept, "no weights of the others"


def test_the_user_may_leave_blocks_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "left_out", lambda: frozenset({"blocks"}))
    run = CpuExecutor(plan_of("resnet18"))
    run.run(smooth_images(2, 64, 64))
    assert prepared_by(run).channels is None


def test_the_same_logits_with_other_outputs() -> None:
    plan, x = plan_of("resnet50"), smooth_images(2, 64, 64)
    run = CpuExecutor(plan)
    outputs = ("stem", *plan.features.values(), POOLED, LOGITS)
    found = run.run(x, outputs)
    assert torch.equal(found[-1], run.run(x)[0])
    for value in found[:-2]:
        assert value.is_contiguous(memory_format=torch.channels_last)
    before = [value.clone() for value in found]
    run.run(smooth_images(2, 64, 64, seed=3), outputs)
    assert all(map(torch.equal, found, before))


def test_both_layouts_share_a_block_of_memory() -> None:
    run = CpuExecutor(plan_of("resnet18"))
    one, two = smooth_images(1, 176, 176), smooth_images(2, 176, 176)
    (alone,), (together,) = run.run(one), run.run(two)
    assert run.direct is not None
    assert len({prepared.channels for prepared in run.direct.kept.values()}) == 1 + (library().lanes == 16)
    for _ in range(2):
        assert torch.equal(run.run(one)[0], alone)
        assert torch.equal(run.run(two)[0], together)
    assert len(run.direct._idle) == 1


@pytest.mark.parametrize("name", ["resnet18", "resnet20"])
def test_later_calls_leave_earlier_outputs_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also outputs of one block of channels, which need no other order in memory."""
    needs_lanes()
    monkeypatch.setattr(direct, "is_faster_blocked", lambda *arguments: True)
    run = CpuExecutor(plan_of(name))
    names = [step.output for step in plan_of(name) if step.output not in (LOGITS, POOLED)]
    x = smooth_images(2, 64, 64)
    found = run.run(x, names)
    kept = [value.clone() for value in found]
    run.run(-x, names)
    run.run(-x)
    assert all(torch.equal(value, before) for value, before in zip(found, kept, strict=True))
