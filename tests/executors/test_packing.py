"""Weights packed for torch's operators: kept for recent shapes, shared between them, in bounded memory."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch

from fastres.bench.measure.calibration import calibrated, smooth_images
from fastres.executors import cpu, packing
from fastres.executors.cpu import CpuExecutor
from fastres.network.architectures import get_architecture
from fastres.network.plan import Conv, Shape, Stem
from tests.executors.test_cpu import executor
from tests.measures import relative_error

pytestmark = pytest.mark.usefixtures("operators")


def packed_weights(run: CpuExecutor) -> dict[int, int]:
    """Return the bytes of every packed weight that ``run`` keeps, each counted once."""
    kept = (conv.weight for packed in run._packed.kept.values() for conv in packed.values())
    return {id(weight): torch.ops.mkldnn._nbytes(weight) for weight in kept}


def test_packed_weights_are_kept_and_shared_between_shapes() -> None:
    run = executor(calibrated(get_architecture("resnet20")), "resnet20")
    for size in range(32, 64):
        run.run(smooth_images(1, size, size))
    assert len(run._packed.kept) == 32
    assert len(packed_weights(run)) < 3 * len(run._plan), "equal layouts are shared"


@pytest.mark.parametrize("copies", [1.0, 1.5, 3.0])
def test_the_memory_of_packed_weights_is_bounded(monkeypatch: pytest.MonkeyPatch, copies: float) -> None:
    monkeypatch.setattr(packing, "COPIES_KEPT", copies)
    monkeypatch.setattr(packing.Packings, "_known", lambda self, name, conv: conv)  # as if every layout were another
    module = calibrated(get_architecture("resnet20"))
    run = executor(module, "resnet20")
    for batch, size in ((1, 32), (2, 40), (1, 48), (1, 32), (3, 56)):
        x = smooth_images(batch, size, size)
        assert relative_error(run.run(x)[0], module(x).detach()) < 1e-5
        assert (batch, size, size, 3) in {shape for shape, _ in run._packed.kept}, "the newest shape is kept"
        assert len(run._packed.kept) == 1 or sum(packed_weights(run).values()) <= run._packed.most_bytes
    weights = sum(step.weight.numel() * 4 for step in run._plan if isinstance(step, (Conv, Stem)))
    assert run._packed.most_bytes == copies * weights
    assert len(run._packed.kept) <= max(1, copies)


def test_another_number_of_threads_packs_anew() -> None:
    run = executor(calibrated(get_architecture("resnet18")), "resnet18")
    x, threads = smooth_images(1, 64, 64), torch.get_num_threads()
    (before,) = run.run(x)
    try:
        torch.set_num_threads(threads + 1)
        (after,) = run.run(x)
    finally:
        torch.set_num_threads(threads)
    assert {key[1] for key in run._packed.kept} == {threads, threads + 1}
    assert relative_error(after, before) < 1e-5


def test_threads_wait_for_the_one_that_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    run = executor(calibrated(get_architecture("resnet20")), "resnet20")
    begun, waited = threading.Event(), threading.Event()
    pack, packed = run._packed._pack, []

    def slow(shape: Shape) -> dict[str, cpu.PackedConv]:
        begun.set()
        assert waited.wait(60)
        packed.append(shape)
        return pack(shape)

    monkeypatch.setattr(run._packed, "_pack", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run._packed.of, (1, 32, 32, 3))
        assert begun.wait(60)
        second = pool.submit(run._packed.of, (1, 32, 32, 3))
        assert not wait([second], timeout=0.2).done, "the second waits for the first"
        waited.set()
        assert first.result(60) is second.result(60)
    assert len(packed) == 1
