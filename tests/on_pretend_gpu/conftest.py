"""The pretend GPU, on which the tests of host code run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastres.bench.pretend_gpu.cuda import Pretence, pretend_gpu
from fastres.executors.gpu import GpuExecutor
from fastres.kernels import reference
from fastres.kernels.launch import INTERPRETED
from fastres.network.plan import LOGITS, POOLED
from tests.network.reference_plan import run_plan


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


@pytest.fixture
def kernels_by_their_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run networks too large for the interpreter with the reference functions of their steps."""
    init = GpuExecutor.__init__

    def keep_plan(self: GpuExecutor, plan: Any) -> None:
        init(self, plan)
        scale = [torch.tensor(values, device="cuda").view(1, 3, 1, 1) for values in (plan.stem.mean, plan.stem.std)]
        self.meaning = plan, *scale  # type: ignore[attr-defined]

    def run(self: GpuExecutor, x: Tensor, outputs: Sequence[str] = (LOGITS,)) -> list[Tensor]:
        plan, mean, std = self.meaning  # type: ignore[attr-defined]
        x = x if x.is_floating_point() else (x.float() / 255 - mean) / std
        values = run_plan(plan, x.to(self.dtype))
        values[POOLED] = reference.average_pool(values[plan.steps[-1].input])
        found = [values[name] for name in outputs]
        return [value.permute(0, 3, 1, 2) if value.dim() == 4 else value.clone() for value in found]

    monkeypatch.setattr(GpuExecutor, "__init__", keep_plan)
    monkeypatch.setattr(GpuExecutor, "run", run)
