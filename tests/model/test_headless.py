"""``num_classes=0``: networks without a classifier, which return pooled features."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.bench.measure.calibration import calibrated, smooth_images
from fastres.errors import ArchitectureError, ClassifierError, InputError
from fastres.export.onnx import export as export_onnx
from fastres.network.architectures import get_architecture
from fastres.weights.fitting import FreshHeadWarning
from tests.executors.test_cpu import torchvision_module
from tests.measures import relative_error


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return torchvision_module("resnet18")


@pytest.fixture(scope="module")
def x() -> Tensor:
    return smooth_images(2, 65, 81, seed=5)


@pytest.fixture(scope="module")
def pooled(module: nn.Module, x: Tensor) -> Tensor:
    without = copy.deepcopy(module)
    without.fc = nn.Identity()
    with torch.no_grad():
        return without(x)


def test_returns_pooled_features(
    module: nn.Module, x: Tensor, pooled: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    model = fastres.load("resnet18", module.state_dict(), num_classes=0)
    assert not [warning for warning in recwarn if issubclass(warning.category, FreshHeadWarning)]
    assert relative_error(model(x), pooled) < 1e-5
    assert torch.equal(model(x), model.embed(x))
    assert model(x).dtype == torch.float32
    assert (model.num_classes, model.categories) == (0, ())
    assert list(model.state_dict()) == [key for key in module.state_dict() if not key.startswith("fc.")]
    assert "no classifier" in repr(model)
    assert model(x[:0]).shape == (0, 512)


def test_checkpoints_without_a_classifier(module: nn.Module, x: Tensor, pooled: Tensor) -> None:
    state = {key: value for key, value in module.state_dict().items() if not key.startswith("fc.")}
    assert relative_error(fastres.load("resnet18", state, num_classes=0)(x), pooled) < 1e-5
    with pytest.raises(fastres.FastresError, match="num_classes=0 for none"):
        fastres.load("resnet18", state)


def test_identity_in_place_of_the_classifier(module: nn.Module, x: Tensor, pooled: Tensor) -> None:
    model = fastres.from_module(module)
    logits = model(x)
    model.fc = nn.Identity()
    assert relative_error(model(x), pooled) < 1e-5
    assert not any(key.startswith("fc.") for key in model.state_dict())
    model.fc = module.fc
    assert torch.equal(model(x), logits)
    without = copy.deepcopy(module)
    without.fc = nn.Identity()
    again = fastres.from_module(without)
    assert again.num_classes == 0
    assert relative_error(again(x), pooled) < 1e-5


def test_padded_shortcuts_and_copies() -> None:
    eager = calibrated(get_architecture("resnet20"))
    eager.fc = nn.Identity()
    x = smooth_images(2, 32, 40)
    with torch.no_grad():
        expected = eager(x)
    model = fastres.load("resnet20", eager.state_dict(), num_classes=0)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert relative_error(twin(x), expected) < 1e-5


def test_random_weights() -> None:
    model = fastres.load("resnet18", None, num_classes=0)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 512)


def test_predict_says_what_to_use_instead(module: nn.Module) -> None:
    model = fastres.load("resnet18", module.state_dict(), num_classes=0)
    with pytest.raises(
        ClassifierError,
        match=r"needs a classifier, but this resnet18 has none \(num_classes=0\); load .* call model\.embed\(x\)",
    ):
        model.predict(np.zeros((64, 64, 3), dtype=np.uint8))
    with pytest.raises(ArchitectureError, match="or 0 for no classifier"):
        fastres.load("resnet18", module.state_dict(), num_classes=-1)


def test_explain_has_no_classifier(module: nn.Module) -> None:
    model = fastres.load("resnet18", module.state_dict(), num_classes=0)
    head = model.explain().rows[-1]
    assert (head.op, head.kernel, head.flops) == ("average pool", "mean", 0)


def test_export_offers_the_embedding_only(module: nn.Module, tmp_path: Path) -> None:
    model = fastres.load("resnet18", module.state_dict(), num_classes=0)
    with pytest.raises(InputError, match=r"no output called 'logits'.* resnet18 has embedding, stem, layer1"):
        export_onnx(model, tmp_path / "model.onnx", progress=False)
    assert not list(tmp_path.iterdir())
    export_onnx(model, tmp_path / "model.onnx", outputs=["embedding"], progress=False)
    assert (tmp_path / "model.onnx").is_file()
