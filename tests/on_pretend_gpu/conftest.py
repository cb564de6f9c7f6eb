"""The pretend GPU, on which the tests of host code run."""

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
    """A pretend H100. A test with a race fails."""
    with pretended() as found:
        yield found
        assert found.timeline.races == []


def pretended(*args: object, **kwargs: object):  # type: ignore[no-untyped-def]
    """Return ``pretend_gpu``, or skip the test if this machine cannot have one."""
    if torch.backends.cuda.is_built() or not INTERPRETED:
        pytest.skip("a pretend GPU needs Triton's interpreter and torch without CUDA")
    return pretend_gpu(*args, **kwargs)  # type: ignore[arg-type]


@pytest.fixture
def averages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the kernels by something fast that depends on the images."""

    def average(self: GpuExecutor, x: Tensor, outputs: tuple[str, ...] = ()) -> list[Tensor]:
        return [x.float().mean((1, 2, 3))[:, None].expand(-1, 10).clone() for _ in outputs]

    monkeypatch.setattr(GpuExecutor, "run", average)
