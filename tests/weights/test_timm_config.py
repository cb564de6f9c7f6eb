"""timm's checkpoints, compared with timm's own models and transforms."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import fastres
from fastres.errors import ArchitectureError, ConfigError, CorruptCheckpointError, StateDictMismatchError, WeightsError
from fastres.images import categories
from fastres.network.architectures import ARCHITECTURES, conv_specs, get_architecture, state_dict_shapes
from fastres.weights import timm_config

from .hub_server import HubServer, Repository
from .other_libraries import calibrated_live, check_logits

timm = pytest.importorskip("timm")
hub = pytest.importorskip("timm.models._hub")

# The names that timm and fastres share. timm has no CIFAR and no plain networks.
SHARED = [name for name in ARCHITECTURES if timm.is_model(name)]


def live(name: str, **options: Any) -> nn.Module:
    return calibrated_live(timm.create_model(name, **options))


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return live("resnet18", num_classes=7)


def saved(module: nn.Module, folder: Path, **changes: Any) -> Path:
    """``module`` as timm saves it, with ``changes`` to its ``config.json``."""
    hub.save_for_hf(module, folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        for table in (config, config["pretrained_cfg"]):
            if key in table or table is config:
                table[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_promised_rows_are_there() -> None:
    names = "resnet26 resnet200 resnext101_32x4d resnext101_32x16d resnext101_32x32d resnet50d resnet101d seresnet50"
    assert set(names.split()) <= set(SHARED)


@pytest.mark.parametrize("name", SHARED)
def test_rows_are_timms(name: str) -> None:
    with torch.device("meta"):
        module = timm.create_model(name)
    theirs = {key: tuple(v.shape) for key, v in module.state_dict().items() if "num_batches" not in key}
    arch = get_architecture(name)
    assert state_dict_shapes(arch) == theirs
    for spec in conv_specs(arch):
        conv, norm = module.get_submodule(spec.conv), module.get_submodule(spec.norm)
        assert (conv.stride, conv.padding, conv.groups) == ((spec.stride,) * 2, (spec.padding,) * 2, spec.groups)
        assert norm.eps == 1e-5


@pytest.mark.parametrize("name", ["resnet26", "resnet50d", "seresnet50"])
def test_logits_of_saved_folders(name: str, tmp_path: Path) -> None:
    module = live(name, num_classes=10)
    model = fastres.load(str(saved(module, tmp_path)))
    assert (model.architecture.name, model.num_classes) == (name, 10)
    check_logits(module, model)


def test_a_folder_as_weights(resnet18: nn.Module, tmp_path: Path) -> None:
    folder = saved(resnet18, tmp_path)
    check_logits(resnet18, fastres.load("resnet18", weights=folder), sizes=((64, 64),))
    with pytest.raises(StateDictMismatchError, match=r"holds resnet18 according to its config\.json, not resnet34"):
        fastres.load("resnet34", weights=folder)
    with pytest.raises(StateDictMismatchError, match="holds resnet18"):
        fastres.load("resnet34", weights=folder / "model.safetensors")
    with pytest.raises(WeightsError, match="has its own weights"):
        fastres.load(str(folder), weights="IMAGENET1K_V1")
    with pytest.warns(fastres.weights.FreshHeadWarning):
        assert fastres.load(str(folder), num_classes=3).categories is None
    assert fastres.load(str(folder), weights=None).num_classes == 7


def test_a_hub_id(resnet18: nn.Module, hub: HubServer, tmp_path: Path) -> None:
    folder = saved(resnet18, tmp_path / "saved")
    hub.repositories["timm/resnet18.mine_in1k"] = repository = Repository()
    commit = repository.commit({path.name: path.read_bytes() for path in folder.iterdir()})
    model = fastres.load("timm/resnet18.mine_in1k")
    assert model.weights == f"timm/resnet18.mine_in1k@{commit}"
    assert hub.files == ["config.json", "model.safetensors"]
    check_logits(resnet18, model, sizes=((64, 64),))
    check_logits(resnet18, fastres.load("resnet18", f"timm/resnet18.mine_in1k@{commit}"), sizes=((64, 64),))


def test_a_folder_without_a_classifier(resnet18: nn.Module, tmp_path: Path) -> None:
    body = timm.create_model("resnet18", num_classes=0).eval()
    body.load_state_dict(resnet18.state_dict(), strict=False)
    model = fastres.load(str(saved(body, tmp_path)))
    assert model.num_classes == 0
    check_logits(body, model, sizes=((64, 64),))


def test_live_modules(resnet18: nn.Module) -> None:
    model = fastres.from_module(resnet18)
    check_logits(resnet18, model, sizes=((64, 64),))
    assert model.categories is None
    assert model.transforms.interpolation == resnet18.pretrained_cfg["interpolation"] == "bicubic"  # type: ignore[index]


@pytest.mark.parametrize(
    "options",
    [
        {"stem_type": "deep_tiered", "stem_width": 32, "avg_down": True},
        {"stem_type": "deep", "stem_width": 16},
        {"avg_down": True, "block_args": {"attn_layer": "se"}},
    ],
    ids=["deep tiered stem, average pool", "deep stem", "average pool, squeeze and excitation"],
)
def test_live_modules_of_no_row(options: dict[str, Any]) -> None:
    module = live("resnet18", **options)
    check_logits(module, fastres.from_module(module), sizes=((65, 99),))


def test_another_gate_is_refused_in_a_network_that_was_never_trained() -> None:
    """timm initialises residual branches to zero, so the gates would not affect the logits."""
    attention = functools.partial(timm.layers.SEModule, gate_layer="hard_sigmoid")
    module = timm.create_model("resnet18", block_args={"attn_layer": attention})
    with pytest.raises(ArchitectureError, match="its forward does not compute a ResNet"):
        fastres.from_module(module)
    assert not module.layer1[0].bn2.weight.any(), "the module does not change"


@pytest.mark.parametrize("attention", ["eca", "ese"])
def test_other_attention_is_refused(attention: str) -> None:
    with pytest.raises(ArchitectureError, match="its parameters differ from a ResNet's"):
        fastres.from_module(timm.create_model("resnet18", block_args={"attn_layer": attention}))


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    datasets = pytest.importorskip("sklearn.datasets")
    china, flower = (Image.fromarray(image) for image in datasets.load_sample_images().images)
    return [china, flower.crop((31, 0, 350, 427))]


@pytest.mark.parametrize(
    "name", ["resnet50.a1_in1k", "resnet50.tv_in1k", "resnet18.fb_swsl_ig1b_ft_in1k", "resnext101_32x4d.gluon_in1k"]
)
def test_transforms_are_timms(name: str, photos: list[Image.Image]) -> None:
    published = timm.get_pretrained_cfg(name).to_dict()
    config = {"architecture": name.partition(".")[0], "pretrained_cfg": json.loads(json.dumps(published))}
    _, own, names = timm_config.parse(config, "a test")
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=published))
    for photo in photos:
        assert torch.equal(own(photo), theirs(photo))
    assert names == categories.load("imagenet")


def test_class_names_are_read(resnet18: nn.Module, tmp_path: Path) -> None:
    names = [f"n{index}" for index in range(7)]
    model = fastres.load(str(saved(resnet18, tmp_path, label_names=names, label_descriptions={"n3": "cat"})))
    assert model.categories == ("n0", "n1", "n2", "cat", "n4", "n5", "n6")
    with pytest.raises(ConfigError, match="label_names must be 7 names"):
        fastres.load(str(saved(resnet18, tmp_path, label_names=names[:3])))


@pytest.mark.parametrize("name", ["resnetaa50", "resnetblur50", "resnetblur18"])
def test_anti_aliased_networks_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """They have the tensors of a plain ResNet. Running them as one would silently give different logits."""
    module = timm.create_model(name)
    plain = f"resnet{name[-2:]}"
    assert {key: v.shape for key, v in module.state_dict().items()} == {
        key: v.shape for key, v in timm.create_model(plain).state_dict().items()
    }
    folder = saved(module, tmp_path)
    for call in (
        lambda: fastres.load(str(folder)),
        lambda: fastres.load(plain, weights=folder),
        lambda: fastres.load(plain, weights=folder / "model.safetensors"),
    ):
        with pytest.raises(ArchitectureError, match=f"timm's {name}\\. .* before each stride"):
            call()
    with pytest.raises(ArchitectureError, match="before its strides"):
        fastres.from_module(module)
    file = tmp_path / f"{name}_a1h-4cf422b3.pth"
    torch.save(module.state_dict(), file)
    with pytest.raises(ArchitectureError, match="before each stride"):
        fastres.load(plain, weights=file)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architecture": "resnetv2_50"}, ArchitectureError, r"timm's resnetv2_50.*Did you mean 'resnet50'"),
        ({"architecture": "resnet34"}, StateDictMismatchError, "do not fit resnet34"),
        ({"architecture": 18}, ConfigError, "architecture is 18"),
        ({"num_classes": 9}, ConfigError, "config.json has 9 classes, but the classifier in .* has 7"),
        ({"num_classes": "7"}, ConfigError, "num_classes is '7'"),
        ({"global_pool": "catavgmax"}, ArchitectureError, "global_pool='catavgmax'"),
        ({"model_args": {"output_stride": 8}}, ArchitectureError, "output_stride=8"),
        ({"model_args": {"act_layer": "gelu"}}, ArchitectureError, "act_layer='gelu'"),
        ({"crop_mode": "squash"}, ConfigError, "crop_mode is 'squash'"),
        ({"input_size": [3, 224, 192]}, ConfigError, r"input_size is \[3, 224, 192\]"),
        ({"crop_pct": 1.5}, ConfigError, r"crop_pct is 1\.5"),
    ],
)
def test_configurations_that_do_not_fit_are_named(
    resnet18: nn.Module, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastres.load(str(saved(resnet18, tmp_path, **changes)))


def test_damaged_folders_are_named(resnet18: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        fastres.load(str(tmp_path))
    folder = saved(resnet18, tmp_path / "saved")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(CorruptCheckpointError, match="not a complete safetensors file"):
        fastres.load(str(folder))
    weights.rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"model\.safetensors or pytorch_model\.bin in .*, which has config\.json"):
        fastres.load(str(folder))
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightsError, match="in several files"):
        fastres.load(str(folder))
    for text, message in (("{", "is not JSON"), ("[1]", "holds a list, not a JSON object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(CorruptCheckpointError, match=message):
            fastres.load(str(folder))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tv_resnet50", "resnet50"),
        ("gluon_resnet50_v1b", "resnet50"),
        ("gluon_resnext101_32x4d", "resnext101_32x4d"),
        ("ssl_resnext101_32x16d", "resnext101_32x16d"),
        ("resnet50.a1_in1k", "resnet50"),
    ],
)
def test_old_names_are_known(old: str, new: str) -> None:
    assert timm_config.architecture(old, "a test").name == new


def test_what_a_training_script_saves_is_read(resnet18: nn.Module, tmp_path: Path) -> None:
    """timm's CheckpointSaver stores the command line, an argparse.Namespace, next to the weights."""
    import argparse

    from timm.utils import CheckpointSaver, ModelEmaV3

    optimiser = torch.optim.SGD(resnet18.parameters(), 0.1)
    averaged = ModelEmaV3(resnet18)
    arguments = argparse.Namespace(model="resnet18", num_classes=7)
    saver = CheckpointSaver(resnet18, optimiser, args=arguments, model_ema=averaged, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=1, metric=0.5)
    model = fastres.load("resnet18", weights=tmp_path / "last.pth.tar")
    assert torch.equal(model.fc.weight, resnet18.fc.weight)  # type: ignore[union-attr]
