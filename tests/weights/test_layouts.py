"""Wrapped, prefixed and foreign state dicts."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres.bench.engines.eager import EagerResNet
from fastres.errors import StateDictMismatchError, WeightsError
from fastres.network.architectures import get_architecture
from fastres.weights.layouts import to_torchvision
from fastres.weights.wrapping import WRAPPERS, unwrap

from .state_dicts import distinct_state, same


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return distinct_state("resnet20")


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_known_wrappers_are_opened(state: dict[str, Tensor], wrapper: str) -> None:
    checkpoint = {"epoch": 3, wrapper: state, "optimizer": {"state": {0: {"step": torch.tensor(1)}}}}
    assert same(unwrap(checkpoint), state)


def test_wrappers_within_wrappers_are_opened(state: dict[str, Tensor]) -> None:
    assert same(unwrap({"model": {"state_dict": OrderedDict(state)}, "step": 1}), state)


def test_an_unknown_wrapper_is_opened_if_it_is_the_only_one_with_tensors(state: dict[str, Tensor]) -> None:
    assert same(unwrap({"classifier_v3": state, "config": {"depth": 20}}), state)
    with pytest.raises(StateDictMismatchError, match="classifier_v3"):
        unwrap({"classifier_v3": state, "teacher": state})


def test_plain_weights_come_before_their_average(state: dict[str, Tensor]) -> None:
    average = distinct_state("resnet20", seed=1)
    assert same(unwrap({"model_ema": average, "model": state}), state)
    assert same(unwrap({"model_ema": average, "epoch": 1}), average)


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "backbone.", "module._orig_mod.", "_orig_mod.module.model.", "net."]
)
def test_prefixes_are_stripped(state: dict[str, Tensor], prefix: str) -> None:
    assert same(unwrap(prefixed(state, prefix)), state)


def test_live_wrappers_are_read_as_they_save_themselves() -> None:
    module = EagerResNet(get_architecture("resnet20"))
    expected = dict(module.state_dict())
    assert same(unwrap(nn.DataParallel(module).state_dict()), expected)
    compiled = torch.compile(module)
    assert isinstance(compiled, nn.Module)
    assert same(unwrap(compiled.state_dict()), expected)
    averaged = torch.optim.swa_utils.AveragedModel(module)
    assert "n_averaged" in averaged.state_dict()
    assert same(unwrap(averaged.state_dict()), expected)


def test_a_head_beside_its_backbone_needs_no_prefix(state: dict[str, Tensor]) -> None:
    mixed = {key if key.startswith("fc.") else f"backbone.{key}": value for key, value in state.items()}
    assert same(unwrap(mixed), state)


def test_a_prefix_on_some_keys_only_stays(state: dict[str, Tensor]) -> None:
    mixed = {f"model.{key}" if index % 2 else key: value for index, (key, value) in enumerate(state.items())}
    assert same(unwrap(mixed), mixed)


def test_the_same_name_with_and_without_prefix_is_an_error(state: dict[str, Tensor]) -> None:
    with pytest.raises(StateDictMismatchError, match=r"with and without the prefix 'module\.'"):
        unwrap({**prefixed(state, "module."), "fc.bias": state["fc.bias"]})


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ([1, 2], "holds a list, not a state dict"),
        (torch.zeros(3), "holds a Tensor"),
        ({}, "empty"),
        ({"state_dict": {}}, "empty"),
        ({"epoch": 3, "lr": 0.1}, r"has 2 other items: 'epoch' \(an int\), 'lr' \(a float\)"),
        ({"conv1.weight": torch.zeros(1), "depth": 20}, r"'depth' \(an int\)"),
        ({0: torch.zeros(1)}, "a key that is an int"),
    ],
)
def test_what_is_no_state_dict_is_named(obj: Any, message: str) -> None:
    with pytest.raises(StateDictMismatchError, match=message):
        unwrap(obj)


def test_modules_are_refused_with_advice() -> None:
    module = nn.Linear(1, 1)
    with pytest.raises(WeightsError, match=r"whole module \(Linear\).*from_module"):
        unwrap(module)
    with pytest.raises(WeightsError, match=r"'model' is a whole module \(Linear\).*state_dict\(\)"):
        unwrap({"model": module, "epoch": 1})


def test_torchvisions_names_stay(state: dict[str, Tensor]) -> None:
    assert same(to_torchvision(state, get_architecture("resnet20")), state)


def test_cifar_training_codes_are_renamed(state: dict[str, Tensor]) -> None:
    foreign = {key.replace("fc.", "linear."): value for key, value in state.items()}
    assert "linear.weight" in foreign
    assert same(to_torchvision(foreign, get_architecture("resnet20")), state)


def test_projections_called_shortcut_are_renamed() -> None:
    state = distinct_state("resnet18")
    foreign = {key.replace("fc.", "linear.").replace("downsample", "shortcut"): value for key, value in state.items()}
    assert "layer2.0.shortcut.1.running_mean" in foreign
    assert same(to_torchvision(foreign, get_architecture("resnet18")), state)


def test_pretrainedmodels_head_is_renamed(state: dict[str, Tensor]) -> None:
    foreign = {key.replace("fc.", "last_linear."): value for key, value in state.items()}
    assert same(to_torchvision(foreign, get_architecture("resnet20")), state)


def test_unknown_names_stay_for_the_fit_check(state: dict[str, Tensor]) -> None:
    assert "tail.weight" in to_torchvision({**state, "tail.weight": torch.zeros(1)}, get_architecture("resnet20"))


def test_a_layout_that_would_merge_two_keys_is_not_taken(state: dict[str, Tensor]) -> None:
    both = {**state, "linear.weight": torch.zeros(10, 64)}
    assert same(to_torchvision(both, get_architecture("resnet20")), both)
