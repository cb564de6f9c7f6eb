"""Class names and preprocessing that are given with the weights, and where they travel to."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import fastres
from fastres.commands.cli import main
from fastres.errors import InputError, ResumeError, UnknownWeightsError
from fastres.export.onnx import export as export_onnx
from fastres.export.pytorch import export_torch

from .mutations import small

NAMES = tuple(f"kind {letter}" for letter in "abcdefg")
OURS = fastres.Transforms(64, 48)
PHOTO = np.random.default_rng(1).integers(0, 256, (50, 60, 3), dtype=np.uint8)


def test_a_modules_names_and_preprocessing_are_unknown() -> None:
    model = fastres.from_module(small())
    assert model.categories is None
    assert (model.transforms.resize, model.transforms.crop) == (256, 224)
    assert model.predict(PHOTO, top_k=1).top1.label.startswith("class ")


def test_names_and_preprocessing_of_a_module() -> None:
    model = fastres.from_module(small(), categories=list(NAMES), transforms=OURS)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.categories == NAMES
        assert twin.transforms == OURS
        assert twin.predict(PHOTO, top_k=1).top1.label in NAMES
    normalised = OURS(PHOTO)[None]
    assert torch.allclose(model(OURS.pixels(PHOTO)[None]), model(normalised), atol=1e-4)


def test_published_weights_describe_a_module() -> None:
    module = torchvision.models.resnet18()
    model = fastres.from_module(module, weights="DEFAULT")
    assert model.categories is not None
    assert model.categories[281] == "tabby"
    assert (model.transforms.resize, model.transforms.crop) == (256, 224)
    assert torch.equal(model.fc.bias, module.fc.bias), "the tensors stay the module's"  # type: ignore[union-attr,arg-type]
    module = torchvision.models.resnet50(num_classes=3)
    tuned = fastres.from_module(module, weights=torchvision.models.ResNet50_Weights.IMAGENET1K_V2)
    assert tuned.categories is None, "a network with other classes"
    assert tuned.transforms.resize == 232
    named = fastres.from_module(module, weights="DEFAULT", categories=["a", "b", "c"], transforms=OURS)
    assert (named.categories, named.transforms) == (("a", "b", "c"), OURS)


def test_descriptions_of_a_module_are_checked() -> None:
    module = small()
    with pytest.raises(InputError, match="categories has 2 names, but the model has 7 classes"):
        fastres.from_module(module, categories=["a", "b"])
    with pytest.raises(UnknownWeightsError, match=r"an architecture of its own.* categories= and transforms="):
        fastres.from_module(module, weights="DEFAULT")
    whole = torchvision.models.resnet18()
    with pytest.raises(UnknownWeightsError, match="resnet18 has no weights called 'IMAGENET1K_V7'"):
        fastres.from_module(whole, weights="IMAGENET1K_V7")
    with pytest.raises(UnknownWeightsError, match="are weights of resnet50, not of resnet18"):
        fastres.from_module(whole, weights=torchvision.models.ResNet50_Weights.DEFAULT)
    with pytest.raises(InputError, match=r"weights is an? OrderedDict, but from_module takes the tensors from the"):
        fastres.from_module(whole, weights=whole.state_dict())
    module.fc = nn.Identity()
    with pytest.raises(InputError, match=r"no classifier \(num_classes=0\)"):
        fastres.from_module(module, categories=list(NAMES))


def test_a_models_own_description_is_kept() -> None:
    model = fastres.from_module(small(), categories=NAMES)
    other = fastres.from_module(model, transforms=OURS)
    assert (other.categories, other.transforms) == (NAMES, OURS)
    assert model.transforms != OURS


def test_names_of_loaded_weights(tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    file.write_text(json.dumps({str(index): name for index, name in enumerate("abc")}))
    model = fastres.load("resnet18", None, num_classes=3, categories=file, transforms=OURS)
    assert (model.categories, model.transforms) == (("a", "b", "c"), OURS)
    with pytest.raises(InputError, match="categories has 3 names, but the model has 1000 classes"):
        fastres.load("resnet18", None, categories=["a", "b", "c"])
    with pytest.raises(InputError, match="transforms is a function"):
        fastres.load("resnet18", None, transforms=lambda x: x)
    with pytest.raises(InputError, match="no classifier"):
        fastres.load("resnet18", None, num_classes=0, categories=["a"])


@pytest.fixture
def digits(tmp_path: Path) -> tuple[Path, Path]:
    """Return a picture, and a file with other names for the ten digits."""
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    names = tmp_path / "digits.txt"
    names.write_text("\n".join(f"digit {index}" for index in range(10)))
    return tmp_path / "photo.png", names


def test_on_the_command_line(digits: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, names = digits
    with_names = ["--categories", str(names)]
    assert main(["predict", str(photo), "--model", "resnet20_digits", *with_names, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["predictions"][0]["label"].startswith("digit ")
    assert main(["look", str(photo), "--model", "resnet20_digits", *with_names, "-o", str(tmp_path / "a.svg")]) == 0
    exports = ["--quiet", "--no-verify", *with_names]
    onnx = tmp_path / "a.onnx"
    assert main(["export", "resnet20_digits", str(onnx), *exports]) == 0
    assert main(["export", "--inspect", str(onnx), "--json"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown[shown.index("{") :])["class_names"].startswith('["digit 0", "digit 1"')
    assert main(["export", "resnet20_digits", *exports, "--server-repository", str(tmp_path / "models")]) == 0
    assert (tmp_path / "models/resnet20_digits/labels.txt").read_text().splitlines()[3] == "digit 3"
    names.write_text("digit 0\n")
    capsys.readouterr()
    for command in (["predict", str(photo), "--model", "resnet20_digits"], ["export", "resnet20_digits", str(onnx)]):
        assert main([*command, *with_names]) == 2
        assert "digits.txt has 1 name, but the model has 10 classes" in capsys.readouterr().err


def test_in_other_formats(tmp_path: Path) -> None:
    model = fastres.from_module(small(), categories=NAMES, transforms=OURS)
    export_torch(model, tmp_path / "a.pt2", verify=False, progress=False)
    extra = {"metadata.json": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    metadata = json.loads(extra["metadata.json"])
    assert json.loads(metadata["class_names"]) == list(NAMES)
    assert (metadata["resize"], metadata["crop"]) == ("64", "48")
    report = export_onnx(model, tmp_path / "a.onnx", verify=False, progress=False)
    assert report.input[2:] == (48, 48)


def test_in_tables(digits: tuple[Path, Path], tmp_path: Path) -> None:
    photo, names = digits
    table = tmp_path / "table.jsonl"
    options = {"decoder": "exact", "workers": 0, "model": "resnet20_digits", "progress": False}
    fastres.classify(photo, table, categories=names, **options)  # type: ignore[arg-type]
    assert json.loads(table.read_text())["label_1"].startswith("digit ")
    with pytest.raises(InputError, match="categories were given with a loaded model"):
        fastres.classify(photo, table, model=fastres.load("resnet20_digits"), categories=names)


def test_an_interrupted_table_needs_the_same_names(
    digits: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastres.classification.job as running

    photo, names = digits
    Image.fromarray(PHOTO).save(tmp_path / "second.png")
    table, done = tmp_path / "table.jsonl", running.classified

    def interrupted(model: fastres.Model, batch: running.Batch, *rest: object) -> object:
        if batch.start:
            raise KeyboardInterrupt
        return done(model, batch, *rest)  # type: ignore[arg-type]

    options = {"decoder": "exact", "workers": 0, "model": "resnet20_digits", "batch_size": 1, "progress": False}
    monkeypatch.setattr(running, "classified", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fastres.classify([photo, photo.with_name("second.png")], table, categories=names, **options)  # type: ignore
    monkeypatch.undo()
    for other in (None, [f"Ziffer {index}" for index in range(10)]):
        with pytest.raises(ResumeError, match=r"class_names_sha256 was '.*' and is now '"):
            fastres.classify(  # type: ignore[call-overload]
                [photo, photo.with_name("second.png")], table, categories=other, resume=True, **options
            )
    report = fastres.classify(
        [photo, photo.with_name("second.png")],
        table,
        categories=names,
        resume=True,
        **options,  # type: ignore
    )
    assert report.resumed == 1
