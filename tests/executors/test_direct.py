"""Plans on oneDNN's primitives: the same results as through torch's operators, whatever surrounds the calls."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from fastres.executors import cpu, direct
from fastres.executors.cpu import CpuExecutor
from fastres.executors.cpu_int8 import Int8Executor
from fastres.folding.build import build_plan
from fastres.network.architectures import get_architecture
from fastres.network.plan import LOGITS, POOLED, Conv, Plan, Stem
from tests.executors.test_cpu_int8 import quantised
from tests.measures import relative_error

pytestmark = pytest.mark.usefixtures("primitives")

NETWORKS = ("resnet18", "resnet50", "resnext50_32x4d", "resnet26d", "seresnet50", "plain18", "resnet20")


def plan_of(name: str, dtype: torch.dtype = torch.float32) -> Plan:
    arch = get_architecture(name)
    return build_plan(calibrated(arch).state_dict(), arch, dtype=dtype)


def through_operators(plan: Plan) -> CpuExecutor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "absent", lambda: "a test asks for torch's operators")
        run = CpuExecutor(plan) if plan.quantisation is None else Int8Executor(plan)
    assert run.direct is None
    return run


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 75, 97)], ids=str)
def test_every_value_is_that_of_torchs_operators(
    name: str, shape: tuple[int, int, int], blocked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "is_faster_blocked", lambda *arguments: blocked)
    # In blocks, other primitives add in another order. Two results that are within 1e-5 of the truth may differ by
    # twice as much.
    most = 2e-5 if blocked else 1e-5
    plan = plan_of(name)
    run, x = CpuExecutor(plan), smooth_images(*shape)
    assert run.direct is not None
    outputs = [value for step in plan for value in step.writes] + [POOLED]
    together = dict(zip(outputs, run.run(x, outputs), strict=True))
    for output, expected in zip(outputs, through_operators(plan).run(x, outputs), strict=True):
        found = together[output]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), output
        assert relative_error(found, expected) < most, output
        assert torch.equal(run.run(x, (output,))[0], found), "alone as together"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reduced_precision(dtype: torch.dtype) -> None:
    if dtype not in cpu.supported_dtypes():
        pytest.skip("this CPU does not compute in it")
    plan = plan_of("resnet50", dtype)
    x = smooth_images(2, 64, 64).to(dtype)
    (truth,) = CpuExecutor(plan_of("resnet50")).run(x.float())
    found, pooled = CpuExecutor(plan).run(x, (LOGITS, POOLED))
    assert (found.dtype, pooled.dtype) == (torch.float32, dtype)
    assert relative_error(found, truth) < 1.25 * relative_error(through_operators(plan).run(x)[0], truth)


@pytest.mark.parametrize("in_8_bit", [False, True])
def test_threads_that_call_at_the_same_time(in_8_bit: bool) -> None:
    plan = quantised("resnet18") if in_8_bit else plan_of("resnet18")
    run = Int8Executor(plan) if in_8_bit else CpuExecutor(plan)
    inputs = [pixels(smooth_images(n, size, 64, seed=n)) for n, size in itertools.product((1, 2, 3), (64, 48))]
    expected = [run.run(x)[0] for x in inputs]
    together = threading.Barrier(4)

    def calls(turn: int) -> list[bool]:
        torch.set_num_threads(1)
        together.wait(60)
        order = inputs[turn:] + inputs[:turn]
        truth = expected[turn:] + expected[:turn]
        return [relative_error(run.run(x)[0], y) < 1e-5 for _ in range(5) for x, y in zip(order, truth, strict=True)]

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(itertools.chain(*pool.map(calls, range(4))))
    finally:
        torch.set_num_threads(threads)
    assert run.direct is not None
    assert 1 <= len(run.direct._idle) <= (os.cpu_count() or 1)


def test_a_new_thread_has_as_many_threads_as_torch() -> None:
    run, x = CpuExecutor(plan_of("resnet20")), smooth_images(1, 32, 32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(run.run, x).result(60)
    finally:
        torch.set_num_threads(threads)
    assert run.direct is not None
    assert [key[1] for key in run.direct.kept] == [threads + 1]


def test_a_head_without_classes() -> None:
    plan = plan_of("resnet18")
    head = replace(plan.head, weight=plan.head.weight[:0], bias=plan.head.bias[:0])
    run, x = CpuExecutor(replace(plan, steps=(*plan.steps[:-1], head))), smooth_images(2, 64, 64)
    logits, pooled = run.run(x, (LOGITS, POOLED))
    assert (logits.shape, logits.dtype) == ((2, 0), torch.float32)
    assert torch.equal(pooled, CpuExecutor(plan).run(x, (POOLED,))[0])


def test_results_stay_as_they_are() -> None:
    plan = plan_of("resnet18")
    run = CpuExecutor(plan)
    outputs = ("stem", plan.features["layer1"], POOLED, LOGITS)
    first = run.run(smooth_images(2, 64, 64, seed=1), outputs)
    copies = [value.clone() for value in first]
    run.run(smooth_images(2, 64, 64, seed=2), outputs)
    for value, copy in zip(first, copies, strict=True):
        assert torch.equal(value, copy)


def test_a_block_grows_and_serves_all_shapes() -> None:
    run = CpuExecutor(plan_of("resnet18"))
    inputs = [smooth_images(n, size, size, seed=n) for n, size in ((1, 32), (4, 96), (2, 64), (1, 32), (5, 100))]
    results = [run.run(x)[0] for x in inputs]
    assert run.direct is not None
    (workspace,) = run.direct._idle
    assert len(workspace._runs) <= 4
    for x, found in zip(inputs, results, strict=True):
        assert torch.equal(run.run(x)[0], found)
    assert workspace._block.nbytes == max(prepared.size for prepared in run.direct.kept.values())


def test_a_very_large_block_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CpuExecutor(plan_of("resnet20"))
    assert run.direct is not None
    run.run(smooth_images(1, 32, 32))
    (workspace,) = run.direct._idle
    monkeypatch.setattr(direct, "LARGEST_KEPT", workspace.size)
    large = smooth_images(2, 96, 96)
    (found,) = run.run(large)
    assert run.direct._idle == []
    assert torch.equal(run.run(large)[0], found)
    run.run(smooth_images(1, 32, 32))
    assert len(run.direct._idle) == 1


@pytest.mark.parametrize("copies", [1.0, 3.0])
def test_the_memory_of_weights_is_bounded(monkeypatch: pytest.MonkeyPatch, copies: float) -> None:
    monkeypatch.setattr(direct, "COPIES_KEPT", copies)
    plan = plan_of("resnet20")
    weights = sum(step.weight.nbytes for step in plan if isinstance(step, (Conv, Stem)))
    run = CpuExecutor(plan)
    assert run.direct is not None
    monkeypatch.setattr(run.direct.library, "memory_desc_equal", lambda *layouts: 0)  # as if every one were another
    for batch, size in ((1, 32), (2, 40), (1, 48), (3, 56), (1, 32)):
        run.run(smooth_images(batch, size, size))
        assert (batch, size, size, 3) in {key[0] for key in run.direct.kept}, "the newest shape is kept"
        assert len(run.direct.kept) == 1 or run.direct.weight_bytes <= copies * weights
    assert len(run.direct.kept) <= copies


def test_shapes_share_weights_and_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CpuExecutor(plan_of("resnet20"))
    assert run.direct is not None
    monkeypatch.setattr(run.direct.kept, "kept", 4)
    run.run(smooth_images(1, 44, 44))
    alone = run.direct.weight_bytes
    for size in range(43, 31, -1):
        run.run(smooth_images(1, size, size))
    assert len(run.direct.kept) == 4
    assert run.direct.weight_bytes < 3 * alone
    (workspace,) = run.direct._idle
    assert len(workspace._runs) == 4, "the functions of forgotten shapes are gone"


def test_an_executor_takes_its_memory_with_it() -> None:
    run = CpuExecutor(plan_of("resnet20"))
    run.run(smooth_images(1, 32, 32))
    assert run.direct is not None
    (workspace,) = run.direct._idle
    (prepared,) = run.direct.kept.values()
    alive = [weakref.ref(thing) for thing in (run, workspace, prepared, next(iter(prepared.weights)))]
    del run, workspace, prepared
    assert [ref() for ref in alive] == [None] * 4, "without a collection of garbage"


@pytest.mark.parametrize("in_8_bit", [False, True])
def test_inference_mode_of_another_call(in_8_bit: bool) -> None:
    plan = quantised("seresnet50") if in_8_bit else plan_of("seresnet50")
    run = Int8Executor(plan) if in_8_bit else CpuExecutor(plan)
    x = smooth_images(1, 64, 64)
    with torch.inference_mode():
        (inside,) = run.run(x)
        assert inside.is_inference()
    (outside,) = run.run(x)
    assert torch.equal(inside, outside)
    assert not outside.is_inference()
    with torch.enable_grad():
        assert torch.equal(run.run(x.clone().requires_grad_())[0].detach(), outside)


def test_the_end_of_the_interpreter_is_quiet() -> None:
    program = (
        "import fastres, torch; model = fastres.load('resnet18', None); model(torch.zeros(1, 3, 64, 64));"
        "assert model._executor.direct is not None; torch.kept = model"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_call_that_fails_leaves_the_executor_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    run, x = CpuExecutor(plan_of("seresnet50")), smooth_images(1, 64, 64)
    (expected,) = run.run(x)

    def failing(*arguments: object) -> Tensor:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "squeeze_excite", failing)
        with pytest.raises(MemoryError, match="no memory"):
            run.run(x)
    assert torch.equal(run.run(x)[0], expected)


class Wrapped(torch.Tensor):
    """A tensor without memory of its own: operators run on the tensor that it holds."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapped:
        made: Wrapped = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)  # type: ignore[attr-defined]
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*[arg.held if isinstance(arg, Wrapped) else arg for arg in args], **(kwargs or {}))
        return cls(found) if isinstance(found, Tensor) and found.shape == args[0].shape else found


@pytest.mark.parametrize("in_8_bit", [False, True])
def test_tensors_without_memory_see_operators(in_8_bit: bool) -> None:
    plan = quantised("resnet18") if in_8_bit else plan_of("resnet18")
    run = Int8Executor(plan) if in_8_bit else CpuExecutor(plan)
    x = smooth_images(1, 64, 64)
    assert relative_error(run.run(Wrapped(x))[0], run.run(x)[0]) < 1e-5


@pytest.mark.parametrize(
    ("way", "title", "onednn"),
    [
        (
            "primitives",
            "; through torch's operators, because FASTRES_WITHOUT leaves out primitives",
            "through torch's operators: FASTRES_WITHOUT leaves out primitives",
        ),
        ("loop", "", "called directly, one by one: FASTRES_WITHOUT leaves out loop"),
    ],
)
def test_the_user_may_leave_ways_out(way: str, title: str, onednn: str) -> None:
    program = (
        "import fastres; model = fastres.load('resnet18', None); print(str(model.explain()).splitlines()[0]);"
        "from fastres.commands.environment import environment; print(environment()['onednn'])"
    )
    environment = {**os.environ, "FASTRES_WITHOUT": way}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    first, said = done.stdout.splitlines()
    assert first == f"resnet18, float32 on cpu{title}"
    assert said.endswith(onednn)
    assert direct.description().endswith("called directly")
