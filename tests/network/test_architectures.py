"""The table of architectures, compared with torchvision's models and with the numbers in the papers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torchvision

from fastres import load
from fastres.errors import ArchitectureError, UnknownModelError
from fastres.network.architectures import (
    ARCHITECTURES,
    block_specs,
    conv_specs,
    get_architecture,
    state_dict_shapes,
)

TORCHVISION = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


@pytest.mark.parametrize("name", TORCHVISION)
def test_names_and_shapes_are_torchvisions(name: str) -> None:
    theirs = getattr(torchvision.models, name)(weights=None).state_dict()
    expected = {key: tuple(value.shape) for key, value in theirs.items() if "num_batches_tracked" not in key}
    assert state_dict_shapes(get_architecture(name)) == expected
    assert list(state_dict_shapes(get_architecture(name))) == list(expected)


@pytest.mark.parametrize("name", ["resnet50", "resnext101_32x8d", "resnet18"])
def test_strides_are_torchvisions(name: str) -> None:
    module = getattr(torchvision.models, name)(weights=None)
    for spec in conv_specs(get_architecture(name)):
        conv = module.get_submodule(spec.conv)
        assert (conv.stride, conv.padding, conv.groups) == ((spec.stride,) * 2, (spec.padding,) * 2, spec.groups)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85), ("resnet110", 1.7)],
)
def test_cifar_networks_have_the_papers_size(name: str, millions: float) -> None:
    """He et al., table 6."""
    shapes = state_dict_shapes(get_architecture(name))
    parameters = sum(math.prod(shape) for key, shape in shapes.items() if "running" not in key)
    assert parameters / 1e6 == pytest.approx(millions, abs=0.04)


@pytest.mark.parametrize(
    "name", [name for name in ARCHITECTURES if name.removeprefix("resnet").removeprefix("plain").isdigit()]
)
def test_depth_is_what_the_name_says(name: str) -> None:
    """The depth counts convolutions on the main path and the classifier."""
    arch = get_architecture(name)
    convs = 1 + sum(len(block.convs) for block in block_specs(arch))
    assert convs + 1 == int(name.removeprefix("resnet").removeprefix("plain"))


def test_plain_networks_have_no_shortcut() -> None:
    for name in ("plain18", "plain34", "plain20", "plain110"):
        arch = get_architecture(name)
        assert not arch.skip
        assert not any(block.projection or block.pad for block in block_specs(arch))


def test_option_a_pads_where_shapes_change() -> None:
    padded = [block.name for block in block_specs(get_architecture("resnet56")) if block.pad]
    assert padded == ["layer2.0", "layer3.0"]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("resnext50", "resnext50_32x4d"),
        ("ResNeXt101", "resnext101_32x4d"),
        ("wide_resnet50", "wide_resnet50_2"),
        ("resnet5o", "resnet50"),
        ("resnetv2_50", "resnet50"),
        ("seresnext50", "seresnext50_32x4d"),
    ],
)
def test_the_same_beginning_and_family_come_first(name: str, first: str) -> None:
    with pytest.raises(UnknownModelError, match=f"Did you mean '{first}'"):
        get_architecture(name)


def test_unknown_names_get_near_matches() -> None:
    with pytest.raises(UnknownModelError, match=r"No model is called 'resnet-50'\. Did you mean 'resnet50'"):
        get_architecture("resnet-50")
    with pytest.raises(UnknownModelError, match=r"No model is called ''\. fastres"):
        load("")
    with pytest.raises(UnknownModelError, match="name must be a string, not int"):
        get_architecture(50)  # type: ignore[arg-type]


def test_names_that_are_meant_as_files(tmp_path: Path) -> None:
    for name in ("typo.safetensors", "./checkpoints/some/typo", tmp_path / "typo.pth"):
        with pytest.raises(UnknownModelError, match=r"typo.*', and there is no such file\. "):
            load(name)  # type: ignore[arg-type]
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(UnknownModelError, match="and this is no file that model"):
        load(str(tmp_path / "picture.png"))


@pytest.mark.parametrize("classes", [-1, 2.5, True, False, "10"])
def test_bad_class_counts(classes: object) -> None:
    with pytest.raises(ArchitectureError, match="at least 1"):
        get_architecture("resnet18").with_classes(classes)  # type: ignore[arg-type]
