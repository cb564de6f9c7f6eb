"""transformers' checkpoints in folders, compared with its own models and processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastres
from fastres.errors import (
    ArchitectureError,
    ConfigError,
    StateDictMismatchError,
)
from fastres.network.architectures import get_architecture, state_dict_shapes
from fastres.weights import transformers_config
from fastres.weights.layouts import to_torchvision

from .other_libraries import SMALL, Logits, check_logits, live_transformers

transformers = pytest.importorskip("transformers")

# The contents of the published files of microsoft/resnet-50.
PROCESSOR = {
    "crop_pct": 0.875,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 224,
}


def saved(module: Logits, folder: Path, **changes: Any) -> Path:
    """``module`` as transformers saves it, with ``changes`` to its ``config.json``."""
    module.module.save_pretrained(folder)  # type: ignore[operator]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        {**SMALL, "downsample_in_bottleneck": True},
        {**SMALL, "downsample_in_first_stage": True},
        {**SMALL, "layer_type": "basic", "hidden_sizes": [16, 32, 64]},
        {**SMALL, "layer_type": "basic", "downsample_in_first_stage": True},
        {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
    ],
    ids=["small", "stride in 1×1", "stride in first stage", "basic", "basic, stride in first stage", "resnet-18"],
)
def test_logits_of_saved_folders(config: dict[str, Any], tmp_path: Path) -> None:
    module = live_transformers(**config)
    model = fastres.load(str(saved(module, tmp_path)))
    check_logits(module, model)
    assert model.num_classes == config.get("num_labels", 2)


def test_where_the_stride_is_changes_the_logits(small: Logits, tmp_path: Path) -> None:
    """The tensors do not show the flag, so reading it wrongly would go unnoticed."""
    x = torch.randn(1, 3, 64, 64)
    plain = fastres.load(str(saved(small, tmp_path / "a")))
    moved = fastres.load(str(saved(small, tmp_path / "b", downsample_in_bottleneck=True)))
    assert float((plain(x) - moved(x)).norm() / plain(x).norm()) > 0.01


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("resnet18", {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}),
        ("resnet26", {"depths": [2, 2, 2, 2]}),
        ("resnet50", {}),
        ("resnet152", {"depths": [3, 8, 36, 3]}),
    ],
)
def test_names_become_torchvisions(name: str, config: dict[str, Any]) -> None:
    full = transformers.ResNetConfig(**config, num_labels=1000)
    with torch.device("meta"):
        state: dict[str, Tensor] = transformers.ResNetForImageClassification(full).state_dict()
    arch, labels = transformers_config.parse(json.loads(full.to_json_string(use_diff=False)), "a test")
    assert arch == get_architecture(name)
    assert labels[999] == "LABEL_999"
    renamed = to_torchvision(state, arch)
    shapes = {key: tuple(value.shape) for key, value in renamed.items() if "num_batches" not in key}
    assert shapes == state_dict_shapes(arch)
    assert transformers_config.parse({**config, "model_type": "resnet"}, "a test")[1] == ("LABEL_0", "LABEL_1")
    headless = {k.removeprefix("resnet."): v for k, v in state.items() if not k.startswith("classifier")}
    assert set(to_torchvision(headless, arch)) == {key for key in renamed if not key.startswith("fc.")}


def test_networks_of_no_row_get_a_name_of_their_own(small: Logits, tmp_path: Path) -> None:
    model = fastres.load(str(saved(small, tmp_path)))
    assert model.architecture.name == "resnet-bottleneck-1-2-1"
    assert len(model.explain(image_size=64)) == len(model.plan)


def test_class_names_are_read(small: Logits, tmp_path: Path) -> None:
    names = {str(index): f"class {index}" for index in range(5)}
    assert fastres.load(str(saved(small, tmp_path, id2label=names))).categories == tuple(names.values())
    for broken in ({"1": "a", "2": "b"}, {"zero": "a"}, ["a"]):
        with pytest.raises(ConfigError, match="id2label does not map"):
            fastres.load(str(saved(small, tmp_path, id2label=broken)))


def test_older_folders_hold_a_pickle(small: Logits, tmp_path: Path) -> None:
    folder = saved(small, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(small.module.state_dict(), folder / "pytorch_model.bin")  # type: ignore[union-attr]
    check_logits(small, fastres.load(str(folder)), sizes=((64, 64),))


def test_live_modules(small: Logits) -> None:
    model = fastres.from_module(small.module)
    check_logits(small, model, sizes=((64, 64),))
    assert model.categories == tuple(f"LABEL_{index}" for index in range(5))


def test_live_modules_that_compute_something_else_are_refused(small: Logits) -> None:
    with pytest.raises(ArchitectureError, match="it has no classifier; pass a ResNetForImageClassification"):
        fastres.from_module(small.module.resnet)  # type: ignore[union-attr]
    with pytest.raises(ArchitectureError, match="activation 'gelu'"):
        fastres.from_module(transformers.ResNetForImageClassification(transformers.ResNetConfig(hidden_act="gelu")))
    other = live_transformers(**SMALL).module
    next(layer for layer in other.modules() if isinstance(layer, torch.nn.BatchNorm2d)).eps = 1e-3
    with pytest.raises(ArchitectureError, match="eps 1e-05"):
        fastres.from_module(other)  # type: ignore[arg-type]
    regnet = transformers.RegNetConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], groups_width=8)
    with pytest.raises(ArchitectureError, match="of type 'regnet'"):
        fastres.from_module(transformers.RegNetForImageClassification(regnet))


def test_half_precision_folders_become_float32(small: Logits, tmp_path: Path) -> None:
    import copy

    half = copy.deepcopy(small).half()
    model = fastres.load(str(saved(half, tmp_path)))
    assert model.conv1.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(model.fc.weight, half.module.classifier[1].weight.float())  # type: ignore


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    datasets = pytest.importorskip("sklearn.datasets")
    china, flower = (Image.fromarray(image) for image in datasets.load_sample_images().images)
    # 383, 376 and 258 pixels on the longer side after resizing to 256. Odd differences are halved and rounded down.
    return [china, flower.crop((7, 0, 298, 427)), flower.resize((100, 101))]


@pytest.mark.parametrize("changes", [{}, {"size": {"shortest_edge": 160}, "crop_pct": 0.95}, {"resample": 2}])
def test_transforms_are_the_processors(changes: dict[str, Any], photos: list[Image.Image], tmp_path: Path) -> None:
    config = {**PROCESSOR, **changes}
    own = transformers_config.transforms(config, "a test")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    module = pytest.importorskip("transformers.models.convnext.image_processing_pil_convnext")
    by_pillow = module.ConvNextImageProcessorPil.from_pretrained(tmp_path)
    by_torchvision = transformers.ConvNextImageProcessor.from_pretrained(tmp_path)
    for photo in photos:
        theirs = by_pillow(photo, return_tensors="pt")["pixel_values"][0]
        assert (own(photo) - theirs).abs().max() < 1e-5  # they scale and normalise in another order
        theirs = by_torchvision(photo, return_tensors="pt")["pixel_values"][0]
        assert (own(photo) - theirs).abs().max() < 2.01 / 255 / min(own.std)  # PyTorch resizes differently from Pillow
        assert (own(photo) - theirs).abs().mean() < 0.1 / 255 / min(own.std)


def test_a_folders_processor_is_used(small: Logits, photos: list[Image.Image], tmp_path: Path) -> None:
    folder = saved(small, tmp_path)
    assert fastres.load(str(folder)).transforms.resize == 256
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "size": 96}))
    model = fastres.load(str(folder))
    assert (model.transforms.resize, model.transforms.crop) == (109, 96)
    assert model.transforms.interpolation == "bicubic"
    predictions = model.predict(np.asarray(photos[0]), top_k=2)
    assert predictions[0].label.startswith("LABEL_")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 384}, "squashes images to 384×384"),
        ({"resample": 1}, "Pillow's filter 1"),
        ({"do_resize": False}, "do_resize=False"),
        ({"rescale_factor": 1.0}, "scales pixels by 1.0"),
        ({"feature_extractor_type": "ViTFeatureExtractor"}, "without cropping them"),
        ({"crop_pct": 0}, "crop_pct is 0"),
        ({"size": "big"}, "size is \\['big'\\]"),
    ],
)
def test_processors_that_do_something_else_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        transformers_config.transforms({**PROCESSOR, **changes}, "a test")


def test_processors_that_crop(photos: list[Image.Image]) -> None:
    config = {
        "image_processor_type": "BitImageProcessor",
        "do_center_crop": True,
        "size": {"shortest_edge": 72},
        "crop_size": {"height": 64, "width": 64},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
        "resample": 3,
    }
    own = transformers_config.transforms(config, "a test")
    module = pytest.importorskip("transformers.models.bit.image_processing_pil_bit")
    theirs = module.BitImageProcessorPil(**{key: value for key, value in config.items() if "type" not in key})
    for photo in photos:
        assert (own(photo) - theirs(photo, return_tensors="pt")["pixel_values"][0]).abs().max() < 1e-5


def test_colours_of_a_processor_that_does_not_normalise_are_not_read() -> None:
    unused = {"do_normalize": False, "image_mean": 0.5, "image_std": 0.5}
    own = transformers_config.transforms({**PROCESSOR, **unused}, "a test")
    assert (own.mean, own.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "regnet"}, ArchitectureError, "of type 'regnet' .ResNetForImageClassification."),
        ({"hidden_act": "gelu"}, ArchitectureError, "activation 'gelu'"),
        ({"num_channels": 1}, ArchitectureError, "images of 1 channels"),
        ({"layer_type": "preactivation"}, ConfigError, "must be 'basic' or 'bottleneck'"),
        ({"depths": [1, 2]}, ConfigError, "depths has 2 stages, but hidden_sizes has 3"),
        ({"depths": [1, 2, 0]}, ConfigError, r"depths is \[1, 2, 0\]"),
        ({"depths": [1, 1, 1]}, StateDictMismatchError, r"unexpected: layer2\.1\."),
        ({"hidden_sizes": [32, 64, 128]}, StateDictMismatchError, "with a wrong shape"),
        ({"hidden_sizes": [30, 64, 96]}, ArchitectureError, "multiples of 4"),
        ({"layer_type": "basic"}, StateDictMismatchError, "do not fit"),
        ({"downsample_in_bottleneck": "yes"}, ConfigError, "downsample_in_bottleneck is 'yes'"),
        ({"id2label": {"0": "a", "1": "b"}}, ConfigError, "config.json has 2 classes, but the classifier in .* has 5"),
    ],
)
def test_configurations_that_do_not_fit_are_named(
    small: Logits, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastres.load(str(saved(small, tmp_path, **changes)))
