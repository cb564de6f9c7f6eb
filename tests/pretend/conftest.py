"""The pretend GPU that tests of host code run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastres.bench.pretend_gpu.cuda import Pretence, pretend_gpu
from fastres.executors.gpu import GpuExecutor
from fastres.kernels.launch import INTERPRETED


@pytest.fixture
def pretence() -> Iterator[Pretence]:
    """A pretend H100; a test that leaves a race behind fails."""
    with pretended() as found:
        yield found
        assert found.timeline.races == []


def pretended(*args: object, **kwargs: object):  # type: ignore[no-untyped-def]
    """``pretend_gpu``, where there can be one."""
    if torch.backends.cuda.is_built() or not INTERPRETED:
        pytest.skip("a GPU is pretended in Triton's interpreter, with a torch without CUDA")
    return pretend_gpu(*args, **kwargs)  # type: ignore[arg-type]


@pytest.fixture
def averages(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of kernels, something quick that depends on the images."""

    def average(self: GpuExecutor, x: Tensor, outputs: tuple[str, ...] = ()) -> list[Tensor]:
        return [x.float().mean((1, 2, 3))[:, None].expand(-1, 10).clone() for _ in outputs]

    monkeypatch.setattr(GpuExecutor, "run", average)
