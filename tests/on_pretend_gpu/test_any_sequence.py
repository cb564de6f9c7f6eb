"""Random sequences of changes, calls and copies on a pretend GPU: kernels in the interpreter, replayed as graphs."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastres.bench.measure.calibration import calibrated
from tests.model.sequences import Pair, Step, run, seeds, steps

from .conftest import pretended
from .test_models import SIZE, TINY

pytestmark = pytest.mark.interpreter

BUDGET = settings(
    max_examples=4, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@functools.cache
def networks() -> tuple[nn.Module, ...]:
    return tuple(calibrated(TINY, seed=seed) for seed in range(4))


@given(seed=seeds, sequence=st.lists(steps(), min_size=6, max_size=10))
@BUDGET
@torch.no_grad()
def test_any_sequence(seed: int, sequence: list[Step]) -> None:
    with pretended() as pretence:
        run(Pair(networks(), (SIZE, SIZE, SIZE + 1), "cuda", 2e-3, seed), sequence)
        assert pretence.timeline.races == []
