"""The process of a server that holds the model, on a pretend GPU."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import fastres
from fastres.bench.pretend_gpu.cuda import Pretence
from fastres.look.cam import class_activation_maps

pytest.importorskip("litserve")
from fastres.serving.arena import Arena
from fastres.serving.models import ModelProcess, Work

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("kernels_by_their_meaning")]

SLOTS, MOST = 24, 20


@pytest.fixture(autouse=True)
def _settings_of_this_process() -> Iterator[None]:
    """Undo what a process of its own would set."""
    usual, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    yield
    signal.signal(signal.SIGINT, usual)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("count", [1, 3, 17])
def test_the_process_computes_batches(pretence: Pretence, tmp_path: Path, count: int) -> None:
    """Of 17 images it makes a batch of 20. The fixture checks for races: the page-locked memory is used again."""
    model = fastres.load("resnet20_digits")
    crop, classes = model.transforms.crop, model.num_classes
    arena = Arena(SLOTS, crop, classes, model.architecture.features)
    path = model.save(tmp_path / "model.safetensors")
    process = ModelProcess(path, "auto", arena, MOST)
    process.setup("cuda:0")
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (SLOTS, crop, crop, 3), dtype=np.uint8)
        for slot in range(SLOTS):
            arena.pixels(slot)[:] = pixels[slot]
        slots = tuple(reversed(range(SLOTS)))[:count]
        maps, seconds = process.predict(Work(slots, (2,) + (0,) * (count - 1)))
        x = torch.from_numpy(pixels[list(slots)]).permute(0, 3, 1, 2).contiguous()
        expected = model(x).softmax(1)
        for row, slot in enumerate(slots):
            torch.testing.assert_close(torch.from_numpy(arena.scores(slot).copy()), expected[row], atol=2e-2, rtol=0)
        assert seconds > 0
        assert [found is not None for found in maps] == [True] + [False] * (count - 1)
        best = expected[0].topk(2).indices.tolist()
        wanted = class_activation_maps(model, x[:1], best)[0]
        torch.testing.assert_close(torch.tensor(maps[0]), wanted, atol=2e-2, rtol=2e-2)
    shapes = {key[0][0] for key in [*process._model._executor._captured, *process._model._executor._called]}  # type: ignore[attr-defined]
    assert shapes == {*range(1, 17), MOST}
