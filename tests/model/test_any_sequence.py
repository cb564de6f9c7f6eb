"""Random sequences of changes, calls, copies and programs on a CPU, compared with torchvision's model."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fastres
from fastres.bench.measure.calibration import calibrated

from .sequences import MAKE_A_PROGRAM, Pair, Step, run, seeds, steps

BUDGET = settings(
    max_examples=7, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@functools.cache
def networks() -> tuple[nn.Module, ...]:
    made = []
    for seed in range(4):
        module = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=6)
        architecture = fastres.from_module(module).architecture
        module.load_state_dict(calibrated(architecture, seed=seed).state_dict())
        made.append(module.eval().requires_grad_(False))
    return tuple(made)


@pytest.mark.slow
@given(seed=seeds, sequence=st.lists(steps(MAKE_A_PROGRAM), min_size=8, max_size=16))
@BUDGET
@torch.no_grad()
def test_any_sequence(seed: int, sequence: list[Step]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
        run(Pair(networks(), (32, 40, 47), "cpu", 1e-4, seed), sequence)
    torch._dynamo.reset()
