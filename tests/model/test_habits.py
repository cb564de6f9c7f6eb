"""Habits from other libraries that lead nowhere get an answer that says where to go."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.models.feature_extraction import create_feature_extractor

import fastres
from fastres.errors import ArchitectureError, GradientError, UnknownModelError

from .mutations import small


def test_a_checkpoint_alone(tmp_path: Path) -> None:
    path = tmp_path / "animals.pth"
    torch.save(fastres.load("resnet18", None, num_classes=3).state_dict(), path)
    with pytest.raises(UnknownModelError, match="is a checkpoint file, which fits resnet18") as error:
        fastres.load(path)
    call = re.search(r"fastres\.load\(.*\)", str(error.value))
    assert call is not None
    assert eval(call[0]).num_classes == 3
    other = tmp_path / "words.pt"
    torch.save({"a": torch.zeros(3)}, other)
    with pytest.raises(UnknownModelError, match="does not name its network"):
        fastres.load(str(other))
    (tmp_path / "net.onnx").write_bytes(b"onnx")
    with pytest.raises(UnknownModelError, match=r"an ONNX file.*fastres\.export\.runtime\.Session"):
        fastres.load(tmp_path / "net.onnx")


def test_a_name_with_a_tag_of_timm() -> None:
    with pytest.raises(UnknownModelError, match=r"Their hub id is 'timm/resnet50\.a1_in1k'"):
        fastres.load("resnet50.a1_in1k")


def test_names_of_other_libraries() -> None:
    model = fastres.load("resnet20_digits")
    for name in ("forward_features", "reset_classifier", "config", "default_cfg"):
        assert not hasattr(model, name)
        with pytest.raises(AttributeError, match=f"has no '{name}'; .*model"):
            getattr(model, name)
    with pytest.raises(AttributeError, match="nothing"):
        model.nothing  # noqa: B018


def test_feature_extractors() -> None:
    with pytest.raises(GradientError, match=r"model\.features\(x, layers\) instead of a feature extractor"):
        create_feature_extractor(fastres.load("resnet20_digits"), ["layer2"])


def test_a_pipeline() -> None:
    pipeline = SimpleNamespace(model=small(), image_processor=object())
    with pytest.raises(ArchitectureError, match=r"from_module\(pipe\.model, transforms=pipe\.image_processor\)"):
        fastres.from_module(pipeline)  # type: ignore[arg-type]
