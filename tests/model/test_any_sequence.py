"""Random sequences of changes, calls, copies and programs on a CPU, compared with torchvision's model."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from .sequences import MAKE_A_PROGRAM, Pair, Step, run, seeds, steps
from .small import resnet

BUDGET = settings(
    max_examples=7, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@functools.cache
def networks() -> tuple[nn.Module, ...]:
    return tuple(resnet(seed) for seed in range(4))


@pytest.mark.slow
@given(seed=seeds, sequence=st.lists(steps(MAKE_A_PROGRAM), min_size=8, max_size=16))
@BUDGET
@torch.no_grad()
def test_any_sequence(seed: int, sequence: list[Step]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
        run(Pair(networks(), (32, 40, 47), "cpu", 1e-4, seed), sequence)
    torch._dynamo.reset()
