"""Networks under any prefix, beside other parts, and in mappings of any class."""

from __future__ import annotations

import re
from collections import UserDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastres.errors import StateDictMismatchError, UnsafeCheckpointError
from fastres.network.architectures import get_architecture
from fastres.weights.layouts import to_torchvision
from fastres.weights.state import load_state
from fastres.weights.unpickling import Inert
from fastres.weights.wrapping import unwrap, unwrap_traced

from .state_dicts import distinct_state, same

RESNET20 = get_architecture("resnet20")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return distinct_state("resnet20")


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def headless(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


@pytest.mark.parametrize(
    "prefix",
    ["encoder.", "module.encoder_q.", "net.backbone.", "student.backbone.", "model.visual.", "a.b.c.d."],
)
@pytest.mark.parametrize("alone", [True, False])
def test_any_prefix_is_found(state: dict[str, Tensor], prefix: str, alone: bool) -> None:
    others = {} if alone else {"projector.0.weight": torch.ones(3, 3), "module.queue": torch.ones(3), "epochs": 3}
    found = unwrap_traced({**others, **prefixed(state, prefix)})
    assert same(found.state, state)
    assert "".join(found.wrappers) == prefix
    assert set(found.beside) == set(others)
    source = load_state(RESNET20, {**others, **prefixed(state, prefix)}).source
    usual = prefix in ("encoder.", "net.backbone.")
    assert source == ("a state dict" if usual and alone else f"a state dict, its part {prefix!r}")


@pytest.mark.parametrize("prefix", ["backbone.", "net.body.", "body."])
@pytest.mark.parametrize("head", ["", "net."])
def test_a_head_outside_the_prefix_belongs_to_the_network(state: dict[str, Tensor], prefix: str, head: str) -> None:
    if not prefix.startswith(head):
        return
    mixed = {(head if key.startswith("fc.") else prefix) + key: value for key, value in state.items()}
    assert same(load_state(RESNET20, {**mixed, "loss.scale": torch.ones(1)}).state, state)


def test_a_head_of_several_layers_is_left_out(state: dict[str, Tensor]) -> None:
    mixed = {**prefixed(headless(state), "encoder."), "fc.0.weight": torch.ones(8, 64), "fc.2.weight": torch.ones(8, 8)}
    with pytest.raises(
        StateDictMismatchError, match=r"no classifier.*num_classes=N.*num_classes=0 for none: an embedder"
    ):
        load_state(RESNET20, mixed)
    loaded = load_state(RESNET20, mixed, num_classes=0)
    assert same(loaded.state, headless(state))


@pytest.mark.parametrize(
    "prefixes",
    [
        ("encoder_q.", "encoder_k."),
        ("module.student.", "module.teacher."),
        ("online.net.", "target.net."),
        ("", "teacher."),
        ("a.", "a.b."),
    ],
)
def test_two_networks_are_an_error_with_a_recipe(state: dict[str, Tensor], prefixes: tuple[str, str]) -> None:
    other = distinct_state("resnet20", seed=1)
    both = {**prefixed(state, prefixes[0]), **prefixed(other, prefixes[1])}
    with pytest.raises(StateDictMismatchError, match=r"holds 2 networks, under the prefixes") as raised:
        load_state(RESNET20, both)
    message = str(raised.value)
    assert all(repr(prefix) in message for prefix in prefixes)
    recipe = re.search(r"Pass one of them: (\{.*\})\.", message)
    assert recipe is not None
    picked = eval(recipe[1], {"state": both})
    assert same(load_state(RESNET20, picked).state, other)


def test_two_networks_in_two_dictionaries_are_an_error(state: dict[str, Tensor]) -> None:
    both = {"student": prefixed(state, "module."), "teacher": prefixed(state, "module."), "epoch": 3}
    with pytest.raises(StateDictMismatchError, match=r"holds 2 networks: 'student', 'teacher'.*\['student'\]"):
        load_state(RESNET20, both)
    one = {"backbone_of_it": state, "head": {"weight": torch.ones(3)}, "epoch": 3}
    assert same(load_state(RESNET20, one).state, state)


def test_a_configuration_under_a_wrappers_name_is_not_opened(state: dict[str, Tensor]) -> None:
    assert same(unwrap({"model": {"depth": 20}, "weights_of_it": state}), state)
    assert same(unwrap({"model": {"depth": 20}, "ema": state}), state)


def test_another_network_under_the_prefix_is_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(StateDictMismatchError, match="'resnet32' and 'plain32'"):
        load_state(RESNET20, prefixed(distinct_state("resnet32"), "student.backbone."))
    deeper = {**state, "layer1.3.conv1.weight": torch.ones(16, 16, 3, 3)}
    with pytest.raises(StateDictMismatchError, match=r"unexpected: layer1\.3\.conv1\.weight"):
        load_state(RESNET20, prefixed(deeper, "student.backbone."))


def test_transformers_networks_are_found_under_prefixes() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512])
    theirs = transformers.ResNetForImageClassification(config).eval().state_dict()
    arch = get_architecture("resnet18")
    plain = to_torchvision(unwrap(theirs), arch)
    assert "layer4.1.bn2.weight" in plain
    wrapped = {**prefixed(theirs, "model.vision."), "text.weight": torch.ones(2)}
    assert same(to_torchvision(unwrap(wrapped), arch), plain)


class Mine(Mapping[str, Any]):
    """A mapping that is no dict, and fails where it is told to."""

    def __init__(self, items: dict[str, Any], fails: str = "") -> None:
        self.items_ = items
        self.fails = fails

    def __getitem__(self, key: str) -> Any:
        if self.fails == "getitem":
            raise ZeroDivisionError("in getitem")
        return self.items_[key]

    def __iter__(self) -> Iterator[str]:
        if self.fails == "iter":
            raise NameError("in iter")
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)

    def get(self, key: str, default: Any = None) -> Any:
        raise AttributeError("get is not used")


def test_mappings_of_any_class_load(state: dict[str, Tensor]) -> None:
    for mapping in (Mine(state), UserDict(state), Mine({"state_dict": Mine(state), "epoch": 1})):
        assert same(load_state(RESNET20, mapping).state, state)


@pytest.mark.parametrize("fails", ["getitem", "iter"])
def test_a_mapping_that_fails_is_named(state: dict[str, Tensor], fails: str) -> None:
    for mapping in (Mine(state, fails), {"model": Mine(state, fails)}):
        with pytest.raises(StateDictMismatchError, match=rf"a Mine that cannot be read \(.*Error: in {fails}\)"):
            load_state(RESNET20, mapping)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.ones((10, 64), np.float32), StateDictMismatchError, r"'fc.weight' \(a ndarray\).*torch\.from_numpy"),
        (Inert("numpy._core.multiarray._reconstruct"), StateDictMismatchError, r"a NumPy array.*torch\.from_numpy"),
        (Inert("torch._utils._rebuild_sparse_tensor"), StateDictMismatchError, "a sparse tensor"),
        (Inert("torch.distributed.tensor.DTensor"), UnsafeCheckpointError, "torch.distributed.tensor.DTensor"),
        ([torch.ones(1)], StateDictMismatchError, "a list"),
        (None, StateDictMismatchError, "a NoneType"),
        (nn.parameter.UninitializedParameter(), StateDictMismatchError, "an UninitializedParameter"),
    ],
)
def test_what_is_no_tensor_among_the_weights_is_named(
    state: dict[str, Tensor], value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_state(RESNET20, {"state_dict": {**state, "fc.weight": value}})


def test_counters_may_be_numbers(state: dict[str, Tensor]) -> None:
    numbers = {k: int(v) if k.endswith("num_batches_tracked") else v for k, v in state.items()}
    assert same(load_state(RESNET20, numbers).state, state)


def test_endless_nesting_ends() -> None:
    loop: dict[str, Any] = {"a": torch.ones(1)}
    loop["model"] = loop
    with pytest.raises(StateDictMismatchError, match="nested too deeply"):
        unwrap(loop)
