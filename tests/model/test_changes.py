"""After any change of a model's tensors, a call uses the tensors that ``state_dict()`` shows, or a named error says why
not. torchvision's model, changed in the same way, gives the expected logits."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

import fastres
from fastres.errors import InputError
from tests.measures import relative_error

from .small import X, loaded

Change = Callable[[Any, Any], nn.Module | None]


def load_inside_another_module(m: Any, other: Any) -> nn.Module:
    outer = nn.Sequential(m)
    outer(X)
    outer.load_state_dict(nn.Sequential(other).state_dict())
    return outer


def load_a_layer(m: Any, other: Any) -> None:
    m.layer4.load_state_dict(other.layer4.state_dict())


def load_by_assignment(m: Any, other: Any) -> None:
    m.load_state_dict({key: value.clone() for key, value in other.state_dict().items()}, assign=True)
    m(X)
    m.conv1.weight.data.mul_(1.1)


def average_in_place(m: Any, other: Any) -> None:
    for ours, theirs in zip(m.parameters(), other.parameters(), strict=True):
        ours.mul_(0.5).add_(theirs, alpha=0.5)


def average_through_data(m: Any, other: Any) -> None:
    for ours, theirs in zip(m.parameters(), other.parameters(), strict=True):
        ours.data.mul_(0.5).add_(theirs.data, alpha=0.5)


def average_through_the_state_dict(m: Any, other: Any) -> None:
    for ours, theirs in zip(m.state_dict().values(), other.state_dict().values(), strict=True):
        ours.copy_(theirs)


def average_with_foreach(m: Any, other: Any) -> None:
    torch._foreach_lerp_(list(m.parameters()), list(other.parameters()), 0.3)


def average_with_torch(m: Any, other: Any) -> nn.Module:
    averaged = torch.optim.swa_utils.AveragedModel(m, use_buffers=True)
    averaged(X)
    averaged.update_parameters(m)
    averaged(X)
    m.load_state_dict(other.state_dict())
    averaged.update_parameters(m)
    return averaged


def vector_to_parameters(m: Any, other: Any) -> None:
    vector = nn.utils.parameters_to_vector(other.parameters())
    nn.utils.vector_to_parameters(vector, m.parameters())


def step_of_an_optimiser(m: Any, other: Any) -> None:
    for parameter in m.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(m.parameters(), lr=1e-3).step()


def change_a_buffer(m: Any, other: Any) -> None:
    m.bn1.running_mean.add_(0.5)
    m(X)
    m.bn1.running_var = other.bn1.running_var.clone()
    m(X)
    m.bn1.running_var.mul_(2)


def assign_a_parameter(m: Any, other: Any) -> None:
    weight = nn.Parameter(other.fc.weight.clone())
    m.fc.weight = weight
    m(X)
    weight.data.mul_(2)
    m(X)
    weight.add_(0.1)
    m(X)
    weight.data = weight.data * 3


def replace_the_head(m: Any, other: Any) -> None:
    head = nn.Linear(512, 7)
    m.fc = head
    m(X)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head.weight.data.normal_()
    m(X)
    nn.init.zeros_(head.bias)


def tie_two_layers(m: Any, other: Any) -> None:
    m.layer1[0].conv2.weight = m.layer1[0].conv1.weight
    m(X)
    m.layer1[0].conv1.weight.mul_(1.2)


def fill_with_apply(m: Any, other: Any) -> None:
    def fill(layer: nn.Module) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.data.fill_(0.01)

    m.apply(fill)


def change_a_view(m: Any, other: Any) -> None:
    m.conv1.weight.view(-1)[::7] = 0
    m(X)
    m.conv1.weight.detach()[0].zero_()


def change_in_inference_mode(m: Any, other: Any) -> None:
    with torch.inference_mode():
        m.fc.weight.copy_(other.fc.weight)
        m(X)
        m.fc.bias = nn.Parameter(other.fc.bias * 2, requires_grad=False)
        m(X)
        m.fc.bias.mul_(0.5)


def swap_in_functional_call(m: Any, other: Any) -> None:
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert relative_error(torch.func.functional_call(m, tensors, (X,)), other(X)) < 1e-5


def deep_copy(m: Any, other: Any) -> nn.Module:
    twin = copy.deepcopy(m)
    twin.layer3.load_state_dict(other.layer3.state_dict())
    m.load_state_dict(other.state_dict())
    return twin


def copy_in_inference_mode(m: Any, other: Any) -> nn.Module:
    with torch.inference_mode():
        twin = copy.deepcopy(m)
        twin(X)
    twin.fc.weight.data.mul_(2)
    return twin


def shallow_copy(m: Any, other: Any) -> nn.Module:
    twin = copy.copy(m)
    twin(X)
    m.layer3.load_state_dict(other.layer3.state_dict())
    return twin


def pickle_and_change(m: Any, other: Any) -> nn.Module:
    twin = pickle.loads(pickle.dumps(m))
    twin(X)
    twin.layer3[0].conv1.weight.data = other.layer3[0].conv1.weight.clone()
    return twin


def save_and_load(m: Any, other: Any) -> nn.Module:
    m.conv1.weight.mul_(1.2)
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    twin.conv1.weight.mul_(1.1)
    return twin


def pickle_a_compiled_module(m: Any, other: Any) -> nn.Module:
    m.compile(backend="eager")
    m(X)
    twin = pickle.loads(pickle.dumps(m))
    twin.fc.weight.mul_(2)
    return twin


def move(m: Any, other: Any) -> None:
    weight = m.conv1.weight
    m.cpu().float().to("cpu")
    m(X)
    weight.data.mul_(1.2)  # a reference from before the move
    m.layer1.to("cpu")
    m(X)
    m.layer1[0].conv1.weight.mul_(1.2)


def round_a_layer(m: Any, other: Any) -> None:
    m.layer1.half()
    m.layer1.float()


def share_memory(m: Any, other: Any) -> None:
    m.share_memory()
    assert m.conv1.weight.is_shared()
    m(X)
    m.conv1.weight.mul_(1.2)


def set_under_the_tables(m: Any, other: Any) -> None:
    m.fc._parameters["bias"] = nn.Parameter(other.fc.bias * 3)
    m(X)
    m.bn1._buffers.update(running_mean=other.bn1.running_mean.clone())


FOLLOWED: list[Change] = [
    load_inside_another_module, load_a_layer, load_by_assignment, average_in_place, average_through_data,
    average_through_the_state_dict, average_with_foreach, average_with_torch, vector_to_parameters,
    step_of_an_optimiser, change_a_buffer, assign_a_parameter, replace_the_head, tie_two_layers, fill_with_apply,
    change_a_view, change_in_inference_mode, swap_in_functional_call, deep_copy, copy_in_inference_mode,
    shallow_copy, pickle_and_change, save_and_load, pickle_a_compiled_module, move, round_a_layer,
    share_memory, set_under_the_tables,
]  # fmt: skip


@pytest.mark.parametrize("change", FOLLOWED, ids=lambda change: change.__name__)
@torch.no_grad()
def test_the_next_call_follows(first: nn.Module, second: nn.Module, change: Change) -> None:
    theirs = copy.deepcopy(first)
    ours = loaded(theirs.state_dict())
    before = ours(X)
    assert relative_error(before, theirs(X)) < 1e-5
    changed_theirs = change(theirs, second) or theirs
    changed_ours: Any = change(ours, second) or ours
    expected = changed_theirs(X)
    assert relative_error(changed_ours(X), expected) < 1e-5
    assert relative_error(changed_ours(X), expected) < 1e-5, "a warm call too"
    shown = {key.removeprefix("module.").removeprefix("0."): v for key, v in changed_ours.state_dict().items()}
    assert relative_error(loaded(shown)(X), expected) < 1e-5, "these are the weights shown"
    if change not in (round_a_layer, swap_in_functional_call):  # which have little or no effect in the end
        assert relative_error(expected, before) > 1e-2 if expected.shape == before.shape else True


def test_writes_that_pytorch_does_not_count(first: nn.Module) -> None:
    model = loaded(first.state_dict())
    before = model(X)
    model.fc.bias.numpy()[:] += 1  # type: ignore[union-attr,operator]
    model.bn1.running_mean.data.add_(0)  # type: ignore[union-attr,operator]
    model.refresh()
    assert relative_error(model(X), before + 1) < 1e-6


def test_assigned_data_are_copied(first: nn.Module, second: nn.Module) -> None:
    model = loaded(first.state_dict())
    weight = second.fc.weight.detach().clone()  # type: ignore[operator,union-attr]
    model.fc.weight.data = weight.data  # type: ignore[union-attr]
    expected = model(X)
    weight.mul_(2)
    assert torch.equal(model.state_dict()["fc.weight"], second.fc.weight)  # type: ignore[arg-type,union-attr]
    assert torch.equal(model(X), expected)


def test_all_derived_values_follow(first: nn.Module, second: nn.Module) -> None:
    model = loaded(first.state_dict())
    model(X)
    nn.Sequential(model).load_state_dict(nn.Sequential(second).state_dict())
    other = loaded(second.state_dict())
    assert torch.equal(model.embed(X), other.embed(X))
    for name, value in model.features(X).items():
        assert torch.equal(value, other.features(X)[name])
    for step, expected in zip(model.plan, other.plan, strict=True):
        for part, truth in zip(step.parameters, expected.parameters, strict=True):
            assert torch.equal(part[0], truth[0])
            assert torch.equal(part[1], truth[1])
    assert model.weights == "a state dict, changed since"
    assert other.weights == "a state dict"
    assert pickle.loads(pickle.dumps(model)).weights == "a state dict, changed since"


def test_new_transforms_reach_the_first_kernel(first: nn.Module) -> None:
    pictures = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    model = loaded(first.state_dict())
    before = model(pictures)
    model.transforms = fastres.Transforms(32, 32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.transforms.mean, model.transforms.std))
    assert relative_error(model(pictures), model((pictures / 255 - mean) / std)) < 1e-5
    assert relative_error(model(pictures), before) > 0.01
    with pytest.raises(InputError, match=r"transforms is a function; give a fastres\.Transforms"):
        model.transforms = lambda x: x  # type: ignore[assignment]


def test_new_class_names_are_checked(first: nn.Module) -> None:
    model = loaded(first.state_dict())
    names = [f"kind {index}" for index in range(10)]
    model.categories = names  # type: ignore[assignment]
    assert model.categories == tuple(names)
    with pytest.raises(InputError, match="3 names, but the model has 10 classes"):
        model.categories = ("a", "b", "c")
    assert model.categories == tuple(names)
    model.categories = None
    assert model.categories is None


def test_without_a_change_nothing_is_folded_again(first: nn.Module) -> None:
    model = loaded(first.state_dict())
    model(X)
    executor = model._executor
    model(X)
    model.state_dict()
    list(model.parameters())
    repr(model)
    copy.deepcopy(model)
    model.eval()
    model.requires_grad_(False)
    assert model._executor is executor
    assert model.weights == "a state dict"


def test_unpickled_parameters_are_ordinary(first: nn.Module) -> None:
    model = loaded(first.state_dict())
    for made in (pickle.loads(pickle.dumps(model.conv1.weight)), copy.deepcopy(model.conv1.weight)):
        assert type(made) is nn.Parameter
    assert type(model.state_dict()["conv1.weight"]) is Tensor
    again = nn.Parameter(model.fc.weight, requires_grad=False)  # type: ignore[arg-type,union-attr]
    assert again.data_ptr() == model.fc.weight.data_ptr()  # type: ignore[union-attr,operator]
    layer = nn.Linear(512, 10)
    layer.weight = again
    assert torch.equal(layer.weight, first.fc.weight)  # type: ignore[union-attr,arg-type]
