"""A model in 8 bit has the interface of a model, and refuses what it cannot do."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from fastres.errors import ArchitectureError, ClassifierError, DeviceError, DtypeError, FastresError, GradientError
from fastres.executors.cpu_int8 import Int8Executor
from fastres.folding.build import build_plan
from fastres.images.transforms import Transforms
from fastres.look.cam import class_activation_maps
from fastres.model.quantized import QuantizedModel
from fastres.network.architectures import get_architecture
from fastres.network.plan import Plan
from fastres.quantisation.rounding import quantise_plan
from tests.measures import relative_error
from tests.quantisation.simple import scales_of

TRANSFORMS = Transforms(72, 64)


@functools.lru_cache(maxsize=2)
def plan(classes: int = 1000) -> Plan:
    network = calibrated(get_architecture("resnet18"))
    whole = build_plan(network.state_dict(), network.architecture.with_classes(classes))
    return quantise_plan(whole, scales_of(whole, images()))


def images() -> Tensor:
    return pixels(smooth_images(3, 64, 64, seed=2))


def model(classes: int = 1000) -> QuantizedModel:
    return QuantizedModel.of_plan(plan(classes), transforms=TRANSFORMS, record={"images": 3})


def test_calls_run_the_plan() -> None:
    run, x = Int8Executor(plan()), images()
    found = model()
    assert isinstance(found, fastres.Model)
    assert found.dtype == torch.int8
    assert "int8 on cpu" in repr(found)
    assert torch.equal(found(x), run.run(x)[0])
    assert torch.equal(found.embed(x), run.run(x, ("pooled",))[0])
    assert {name: torch.equal(value, run.run(x, (found.outline.features[name],))[0])
            for name, value in found.features(x).items()} == dict.fromkeys(found.outline.features, True)  # fmt: skip
    assert found(x[:0]).shape == (0, 1000)
    assert found.features(x[:0])["layer1"].dtype == torch.float32
    assert found.predict([x[0], x[1]], top_k=2)[0][0].index == int(found(x[:1]).argmax())
    quantisation = plan().quantisation
    assert quantisation is not None
    assert torch.equal(found.classifier[0], plan().head.weight * quantisation.weights["head"][:, None])
    assert torch.equal(found.classifier[1], plan().head.bias)
    found.warmup((1, 2), 64)


def test_copies_give_the_same_logits() -> None:
    one, x = model(), images()
    expected = one(x)
    for twin in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one)), one.cpu(), one.eval()):
        assert torch.equal(twin(x), expected)
        assert twin.record == {"images": 3}


def test_compiled_and_mapped_calls_give_the_same_logits() -> None:
    one, x = model(), images()
    expected = one(x)
    assert torch.equal(torch.compile(one, backend="eager", fullgraph=True)(x), expected)
    assert torch.equal(torch.vmap(one)(x[None])[0], expected)


def test_changes_of_the_tensors_are_followed() -> None:
    one, x = model(), images()
    before = one(x)
    with torch.no_grad():
        one.layer1[0].conv1.weight.zero_()
    assert not torch.equal(one(x), before)
    assert "changed since" in one.weights


def test_without_a_classifier() -> None:
    one = model(0)
    assert one(images()).shape == (3, 512)
    with pytest.raises(ClassifierError):
        one.classifier  # noqa: B018


def test_class_activation_maps_average_to_the_products_with_the_classifier() -> None:
    one, x = model(), images()
    maps = class_activation_maps(one, x, [3, 5])
    assert relative_error(maps.mean((2, 3)), one.embed(x) @ one.classifier[0][[3, 5]].T) < 1e-5


@pytest.mark.filterwarnings("ignore")  # of the tracers
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m.half(), DtypeError, "float16"),
        (lambda m: m.float(), DtypeError, "Load the float checkpoint"),
        (lambda m: m.to("meta"), DeviceError, "on the CPU only"),
        (lambda m: m.cuda(), DeviceError, "CPU"),
        (lambda m: m.train(), GradientError, "inference"),
        (lambda m: m.load_state_dict(m.state_dict()), ArchitectureError, "fastres.load"),
        (lambda m: setattr(m, "fc", nn.Linear(512, 3)), ArchitectureError, "classifier"),
        (lambda m: setattr(m, "transforms", Transforms(72, 64, std=(1, 1, 1))), ArchitectureError, "normalisation"),
        (lambda m: torch.jit.trace(m, images()), ArchitectureError, "8 bit"),
        (lambda m: torch.export.export(m, (images(),)), ArchitectureError, "8 bit"),
        (lambda m: m.plan_in(torch.float32), DtypeError, "float weights"),
        (lambda m: m(images().double()), DtypeError, "float64"),
    ],
)
def test_what_it_cannot_do_is_named(
    call: Callable[[QuantizedModel], object], error: type[FastresError], words: str
) -> None:
    one, x = model(), images()
    expected = one(x)
    if "cuda" in call.__code__.co_names and torch.cuda.is_available():
        pytest.skip("the message is about machines without a GPU")
    with pytest.raises(error, match=words):
        call(one)
    assert torch.equal(one(x), expected), "the model is as it was"


def test_sizes_of_the_transforms_can_be_set() -> None:
    one = model()
    one.transforms = Transforms(80, 64)
    assert one.transforms.resize == 80
    assert torch.equal(one(images()), model()(images()))


def test_tensors_are_checked() -> None:
    tensors = dict(model().state_dict())
    del tensors["stem.bias"]
    with pytest.raises(ArchitectureError, match=r"stem\.bias is missing"):
        QuantizedModel(tensors, plan().architecture, transforms=TRANSFORMS)
