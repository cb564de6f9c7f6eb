"""Changes that the plan would ignore are refused, and what no longer fits is named at the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from fastres.errors import ArchitectureError, GradientError
from tests.measures import relative_error

from .small import X, loaded


def weight_norm(m: Any) -> None:
    nn.utils.parametrizations.weight_norm(m.fc)


def swap_tensors(m: Any) -> None:
    torch.utils.swap_tensors(m.fc.weight, nn.Parameter(torch.zeros(10, 512)))


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "a layer": (lambda m: setattr(m.layer1[0], "conv1", nn.Conv2d(64, 64, 3)), "conv1 cannot be replaced by a Conv2d"),
    "an activation": (lambda m: setattr(m, "relu", nn.ReLU6()), "model.relu cannot be set"),
    "a stage": (lambda m: setattr(m, "layer4", nn.Identity()), "model.layer4 cannot be replaced by Identity"),
    "a stride": (lambda m: setattr(m.conv1, "stride", (1, 1)), "stride cannot be set on a layer"),
    "an epsilon": (lambda m: setattr(m.bn1, "eps", 1e-3), "eps cannot be set on a layer"),
    "another parameter": (lambda m: m.fc.register_parameter("scale", nn.Parameter(torch.ones(1))), "scale cannot be"),
    "another buffer": (lambda m: m.fc.register_buffer("mask", torch.ones(1)), "mask cannot be set"),
    "removal": (lambda m: delattr(m.fc, "bias"), "bias cannot be taken from a layer"),
    "pruning": (lambda m: torch.nn.utils.prune.l1_unstructured(m.fc, "weight", amount=0.5), "make pruning and"),
    "a parametrisation": (weight_norm, "make it permanent, and use fastres.from_module"),
    "a hook": (lambda m: m.layer1.register_forward_hook(print), "cannot be hooked"),
    "a backward hook": (lambda m: m.layer1.register_full_backward_hook(print), "cannot be hooked"),
    "the architecture": (lambda m: setattr(m, "architecture", None), "model.architecture cannot be set"),
    "scripting": (lambda m: torch.jit.script(m), "torch.jit.script cannot compile a fastres model"),
    "scripting around it": (lambda m: torch.jit.script(nn.Sequential(m)), "'fastres export' writes files"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_plan_would_ignore_is_refused(first: nn.Module, what: str) -> None:
    change, message = REFUSED[what]
    model = loaded(first.state_dict())
    before = model(X)
    with pytest.raises(ArchitectureError, match=message):
        change(model)
    assert torch.equal(model(X), before), "the model is unharmed"


def test_training_a_layer_is_refused(first: nn.Module) -> None:
    model = loaded(first.state_dict())
    for start in (model.layer1.train, model.layer1.requires_grad_, model.train, model.requires_grad_):
        with pytest.raises(GradientError):
            start()  # type: ignore[operator]
    assert model.layer1.eval() is model.layer1  # type: ignore[operator,union-attr]


def test_swapped_tensors_are_refused_by_pytorch(first: nn.Module) -> None:
    model = loaded(first.state_dict())
    before = model(X)
    with pytest.raises(RuntimeError, match="weakref"):
        swap_tensors(model)
    assert torch.equal(model(X), before)


BROKEN: dict[str, tuple[Callable[[Any], object], str]] = {
    "no head": (lambda m: delattr(m, "fc"), r"2 missing \(fc.weight, fc.bias\)"),
    "a module in the table": (lambda m: m._modules.update(fc=nn.Linear(512, 10)), r"1 of another class \(fc\)"),
    "a parameter of its own": (lambda m: m.register_parameter("a", nn.Parameter(torch.ones(1))), r"1 additional \(a\)"),
    "another shape": (lambda m: setattr(m.fc, "bias", nn.Parameter(torch.ones(3))), r"fc.bias \[3\] instead of \[10\]"),
    "no tensor": (lambda m: setattr(m.fc, "bias", None), r"1 missing \(fc.bias\)"),
    "whole numbers": (
        lambda m: setattr(m.bn1, "running_mean", torch.ones(64, dtype=torch.int64)), "running_mean .torch.int64"
    ),
    "a sparse tensor": (lambda m: setattr(m.bn1, "running_mean", torch.ones(64).to_sparse()), "torch.sparse_coo"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_call_names_what_no_longer_fits(first: nn.Module, what: str) -> None:
    change, message = BROKEN[what]
    model = loaded(first.state_dict())
    model(X)
    change(model)
    for _ in range(2):
        with pytest.raises(ArchitectureError, match=message):
            model(X)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_change_that_fails_half_way_is_named(first: nn.Module) -> None:
    model = loaded(first.state_dict())
    with pytest.raises(ArchitectureError, match="weight_g cannot be set"):
        nn.utils.weight_norm(model.fc)
    with pytest.raises(ArchitectureError, match=r"1 missing \(fc.weight\)"):
        model(X)
    model.fc.weight = nn.Parameter(first.fc.weight.clone())  # type: ignore[union-attr,operator]
    assert relative_error(model(X), first(X)) < 1e-5
