"""Fitting state dicts to an architecture, and random state dicts."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchvision
from torch import Tensor

from fastres.errors import ArchitectureError, StateDictMismatchError, WeightsError
from fastres.network.architectures import ARCHITECTURES, get_architecture, state_dict_shapes
from fastres.weights.fitting import HEAD, Fitted, FreshHeadWarning, fit_state, known_fits, random_state

from .state_dicts import distinct_state, same


def fit(model: str, state: dict[str, Tensor], num_classes: int | None = None, copy: bool = True) -> Fitted:
    return fit_state(state, get_architecture(model), num_classes, "a test", copy)


def without(state: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in keys}


def mismatch(model: str, state: dict[str, Tensor], num_classes: int | None = None) -> str:
    with pytest.raises(StateDictMismatchError) as raised:
        fit(model, state, num_classes)
    return str(raised.value)


def test_a_fitting_state_is_kept_bit_for_bit() -> None:
    state = distinct_state("resnet20")
    fitted = fit("resnet20", state)
    assert same(fitted.state, state)
    assert fitted.arch == get_architecture("resnet20")
    assert fitted.missing_head is False


def test_order_does_not_matter_and_becomes_torchvisions() -> None:
    state = distinct_state("resnet18")
    fitted = fit("resnet18", dict(reversed(state.items())))
    assert same(fitted.state, state)
    assert list(fitted.state) == list(torchvision.models.resnet18().state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_types_become_float32(dtype: torch.dtype) -> None:
    state = distinct_state("resnet20")
    stored = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    fitted = fit("resnet20", stored, copy=False)
    assert same(fitted.state, {key: value.float() if value.ndim else value for key, value in stored.items()})


@pytest.mark.parametrize("copy", [True, False])
def test_memory_is_shared_only_where_asked(copy: bool) -> None:
    state = distinct_state("resnet20")
    fitted = fit("resnet20", state, copy=copy)
    for key in ("conv1.weight", "bn1.running_mean", "fc.weight"):
        assert (fitted.state[key].data_ptr() == state[key].data_ptr()) is not copy


def test_parameters_strides_and_gradients_are_left_behind() -> None:
    state = distinct_state("resnet18")
    odd: dict[str, Tensor] = {
        **state,
        "conv1.weight": torch.nn.Parameter(state["conv1.weight"].to(memory_format=torch.channels_last)),
    }
    for copy in (True, False):
        weight = fit("resnet18", odd, copy=copy).state["conv1.weight"]
        assert type(weight) is Tensor
        assert weight.is_contiguous()
        assert not weight.requires_grad
        assert torch.equal(weight, state["conv1.weight"])


def test_counters_are_always_there() -> None:
    state = distinct_state("resnet20")
    bare = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    fitted = fit("resnet20", bare)
    assert list(fitted.state) == list(state)
    counters = [value for key, value in fitted.state.items() if key.endswith("num_batches_tracked")]
    assert len(counters) == 19
    assert all(counter.dtype == torch.int64 and counter.shape == () and counter == 0 for counter in counters)


def test_odd_counters_do_not_matter() -> None:
    state = distinct_state("resnet20")
    odd = {**state, "bn1.num_batches_tracked": torch.tensor([5.0]), "ghost.num_batches_tracked": torch.tensor(1)}
    fitted = fit("resnet20", odd)
    assert same(fitted.state, {**state, "bn1.num_batches_tracked": torch.tensor(5)})


def test_the_class_count_is_the_checkpoints() -> None:
    state = distinct_state("resnet20", num_classes=37)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = fit("resnet20", state)
        assert same(fit("resnet20", state, num_classes=37).state, state)
    assert fitted.arch.num_classes == 37
    assert same(fitted.state, state)


def test_another_class_count_gives_a_fresh_head_with_a_warning() -> None:
    state = distinct_state("resnet20")
    torch.manual_seed(5)
    with pytest.warns(FreshHeadWarning, match="a test have a classifier of 10 classes, so the head for num_classes=7"):
        fitted = fit("resnet20", state, num_classes=7)
    assert fitted.missing_head is True
    assert fitted.arch.num_classes == 7
    assert list(fitted.state) == list(state)
    assert same(without(fitted.state, *HEAD), without(state, *HEAD))
    torch.manual_seed(5)
    linear = torch.nn.Linear(64, 7)
    assert torch.equal(fitted.state["fc.weight"], linear.weight)
    assert torch.equal(fitted.state["fc.bias"], linear.bias)


def test_a_missing_head_needs_a_class_count() -> None:
    state = without(distinct_state("resnet20"), *HEAD)
    message = mismatch("resnet20", state)
    assert "2 missing: fc.weight, fc.bias" in message
    assert "num_classes=" in message
    with pytest.warns(FreshHeadWarning, match="no classifier, so the head for num_classes=10"):
        fitted = fit("resnet20", state, num_classes=10)
    assert fitted.missing_head is True
    assert fitted.state["fc.weight"].shape == (10, 64)


@pytest.mark.parametrize("num_classes", [-1, 2.0, True, "10"])
def test_impossible_class_counts_are_named(num_classes: int) -> None:
    with pytest.raises(ArchitectureError, match="num_classes is"):
        fit("resnet20", distinct_state("resnet20"), num_classes=num_classes)


def test_every_kind_of_misfit_is_listed_with_counts() -> None:
    state = distinct_state("resnet20")
    state["layer1.0.conv1.weight"] = torch.zeros(16, 16, 1, 1)
    state["layer1.0.bn1.weight"] = torch.zeros(16, dtype=torch.int8)
    state["layer1.0.bn1.bias"] = torch.zeros(16, device="meta")
    state = without(state, "conv1.weight", "fc.bias")
    state.update({f"extra{index}.weight": torch.zeros(1) for index in range(11)})
    message = mismatch("resnet20", state)
    assert "The weights from a test do not fit resnet20." in message
    assert "2 missing: conv1.weight, fc.bias\n" in message
    assert "11 unexpected: extra0.weight, " in message
    assert "extra7.weight, and 3 more\n" in message
    assert "1 with a wrong shape: layer1.0.conv1.weight [16, 16, 1, 1] instead of [16, 16, 3, 3]\n" in message
    assert (
        "2 not dense floating-point data: layer1.0.bn1.weight (torch.int8), layer1.0.bn1.bias (on the meta" in message
    )
    assert "no model that fastres knows" in message
    assert "num_batches_tracked" not in message


@pytest.mark.parametrize("shape", [(10, 63), (640,), (0, 64), ()])
def test_a_head_of_another_shape_is_a_misfit(shape: tuple[int, ...]) -> None:
    state = {**distinct_state("resnet20"), "fc.weight": torch.zeros(shape)}
    for num_classes in (None, 5):
        assert f"fc.weight {list(shape)} instead of [" in mismatch("resnet20", state, num_classes)


def test_integer_weights_of_the_right_shape_are_a_misfit() -> None:
    state = {**distinct_state("resnet20"), "fc.weight": torch.zeros(10, 64, dtype=torch.int8)}
    message = mismatch("resnet20", state)
    assert "fc.weight (torch.int8)" in message
    assert "pass the weights as dense floating-point tensors" in message


@pytest.mark.parametrize("given", ["resnet34", "resnet50", "wide_resnet50_2", "plain34"])
def test_the_model_that_the_shapes_fit_is_named(given: str) -> None:
    state = distinct_state(given, num_classes=5)
    assert f"those of '{given}'; load that model" in mismatch("resnet18", state)
    assert f"those of '{given}'; load that model" in mismatch("resnet18", without(state, *HEAD))


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_every_model_fits_itself(model: str) -> None:
    shapes = state_dict_shapes(get_architecture(model))
    fits = known_fits({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    assert model in fits
    # Networks that differ only in parameter-free shortcuts have the same state dict.
    assert all(state_dict_shapes(ARCHITECTURES[other]) == shapes for other in fits)


@pytest.mark.parametrize("model", ["resnet18", "resnext50_32x4d"])
def test_random_weights_are_torchvisions_for_the_same_seed(model: str) -> None:
    torch.manual_seed(11)
    expected = torchvision.models.get_model(model, num_classes=12).state_dict()
    after = torch.rand(3)
    torch.manual_seed(11)
    state = random_state(get_architecture(model).with_classes(12))
    assert torch.equal(torch.rand(3), after), "the same number of draws from the global generator"
    assert same(state, dict(expected))


def test_what_is_drawn_ignores_default_dtype_and_device() -> None:
    state = distinct_state("resnet20")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        drawn = random_state(get_architecture("resnet20"))
        with pytest.warns(FreshHeadWarning):
            fresh = fit("resnet20", state, num_classes=3)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for tensors in (drawn, fresh.state):
        for key, value in tensors.items():
            assert value.device.type == "cpu"
            assert value.dtype == (torch.int64 if key.endswith("num_batches_tracked") else torch.float32)


COUNTERS: dict[str, tuple[Tensor, int]] = {
    "not a number": (torch.tensor(float("nan")), 0),
    "infinite": (torch.tensor(float("inf")), 0),
    "complex": (torch.tensor(1j), 0),
    "1e30": (torch.tensor(1e30), 0),
    "past int64": (torch.tensor(2**64 - 1, dtype=torch.uint64), 0),
    "negative": (torch.tensor(-5), -5),
    "boolean": (torch.tensor(True), 1),
    "a vector": (torch.tensor([3]), 3),
    "two": (torch.tensor([3, 4]), 0),
    "empty": (torch.tensor([]), 0),
    "meta": (torch.tensor(1, device="meta"), 0),
    "with a gradient": (torch.tensor(2.0, requires_grad=True), 2),
}


@pytest.mark.parametrize("name", COUNTERS)
def test_counters_of_any_kind_do_no_harm(name: str) -> None:
    given, expected = COUNTERS[name]
    counter = fit("resnet20", {**distinct_state("resnet20"), "bn1.num_batches_tracked": given}).state[
        "bn1.num_batches_tracked"
    ]
    assert (counter.dtype, counter.shape, int(counter)) == (torch.int64, (), expected)


class Tagged(Tensor):
    """A tensor subclass that computes as a tensor does."""


def odd_heads() -> dict[str, Tensor]:
    """Harmless forms of a weight [10, 64]."""
    weight = torch.randn(10, 64)
    return {
        "float64": weight.double(),
        "float8": weight.to(torch.float8_e4m3fn),
        "with a gradient": weight.clone().requires_grad_(),
        "result of a computation": weight.clone().requires_grad_() * 2,
        "parameter": torch.nn.Parameter(weight),
        "expanded": torch.randn(1, 64).expand(10, 64),
        "one value": torch.tensor(2.0).expand(10, 64),
        "transposed": torch.randn(64, 10).t(),
        "part of a larger one": torch.randn(20, 128)[5:15, ::2],
        "lazily negated": torch.complex(weight, weight).conj().imag,
        "subclass": weight.as_subclass(Tagged),
        "not finite": weight.masked_fill(weight > 1, float("nan")).masked_fill(weight < -1, float("inf")),
        "inference tensor": torch.inference_mode()(lambda: weight * 2)(),
    }


@pytest.mark.parametrize("name", odd_heads())
@pytest.mark.parametrize("copy", [True, False])
def test_harmless_forms_of_a_weight_load_with_their_values(name: str, copy: bool) -> None:
    given = odd_heads()[name]
    weight = fit("resnet20", {**distinct_state("resnet20"), "fc.weight": given}, copy=copy).state["fc.weight"]
    assert (type(weight), weight.dtype, weight.requires_grad, weight.is_neg()) == (Tensor, torch.float32, False, False)
    assert weight.is_contiguous()
    assert weight.untyped_storage().nbytes() == weight.nbytes
    assert torch.equal(weight.nan_to_num(7.0), given.detach().resolve_neg().float().nan_to_num(7.0))


def test_no_two_weights_share_memory() -> None:
    state = distinct_state("resnet20")
    state["bn1.bias"] = state["bn1.weight"]
    fitted = fit("resnet20", state, copy=False).state
    fitted["bn1.bias"].fill_(3)
    assert not (fitted["bn1.weight"] == 3).any()


def odd_kinds() -> dict[str, Tensor]:
    """Forms of a weight [10, 64] that are refused."""
    weight = torch.randn(10, 64)
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(10, 64)
    return {
        "torch.sparse_coo": weight.to_sparse(),
        "torch.sparse_csr": weight.to_sparse_csr(),
        "torch.qint8": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "torch._mkldnn": weight.to_mkldnn(),
        "on the meta device": weight.to("meta"),
        "torch.complex64": weight.to(torch.complex64),
        "torch.int32": weight.int(),
        "torch.bool": weight > 0,
        "a FakeTensor": fake,
    }


@pytest.mark.parametrize("name", odd_kinds())
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*", "ignore:Sparse CSR")
def test_other_forms_of_a_weight_are_named(name: str) -> None:
    message = mismatch("resnet20", {**distinct_state("resnet20"), "fc.weight": odd_kinds()[name]})
    assert f"1 not dense floating-point data: fc.weight ({name}" in message


def test_a_type_that_cannot_be_converted_is_named() -> None:
    weight = torch.zeros(10, 64, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(WeightsError, match=r"fc\.weight of a test cannot be converted to float32: it is float4"):
        fit("resnet20", {**distinct_state("resnet20"), "fc.weight": weight})


def test_an_all_zero_classifier_is_kept() -> None:
    state = {**distinct_state("resnet20"), "fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}
    assert same(fit("resnet20", state).state, state)
