"""Class-activation maps and the pictures of what a network sees."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

import fastres
from fastres.bench.digits.data import as_image, load_scans
from fastres.bench.measure.calibration import calibrated, smooth_images
from fastres.commands.cli import main
from fastres.errors import ClassifierError, ImageError, InputError, MissingDependencyError
from fastres.images.transforms import Transforms
from fastres.look.cam import at_pixels, class_activation_maps
from fastres.look.figures import cam_figure, features_figure, filters_figure, look, mosaic
from fastres.network.architectures import get_architecture
from tests.executors.test_cpu import torchvision_module
from tests.measures import relative_error


@pytest.fixture(scope="module")
def model() -> fastres.Model:
    return fastres.from_module(torchvision_module("resnet18"))


@pytest.fixture(scope="module")
def digits() -> fastres.Model:
    return fastres.load("resnet20_digits")


@pytest.fixture(scope="module")
def flower() -> np.ndarray:
    return load_sample_images().images[1]


class TestMaps:
    @pytest.fixture
    def x(self) -> Tensor:
        return smooth_images(3, 97, 131, seed=2)

    def test_mean_plus_bias_is_the_logit(self, model: fastres.Model, x: Tensor) -> None:
        maps = class_activation_maps(model, x, range(1000))
        assert maps.shape == (3, 1000, 4, 5)
        assert maps.dtype == torch.float32
        assert relative_error(maps.mean((2, 3)) + model.state_dict()["fc.bias"], model(x)) < 1e-5

    def test_maps_are_the_classifier_at_every_cell(self, model: fastres.Model, x: Tensor) -> None:
        module = torchvision_module("resnet18")
        features: list[Tensor] = []
        module.layer4.register_forward_hook(lambda _, __, output: features.append(output))
        with torch.no_grad():
            module(x)
            cells = module.fc(features[0].permute(0, 2, 3, 1)) - module.fc.bias  # [N, h, w, classes]
        assert (
            relative_error(class_activation_maps(model, x, [3, 900]), cells[..., [3, 900]].permute(0, 3, 1, 2)) < 1e-5
        )

    def test_classes(self, model: fastres.Model, x: Tensor) -> None:
        all_maps = class_activation_maps(model, x, range(1000))
        best = model(x).argmax(1)
        torch.testing.assert_close(class_activation_maps(model, x)[:, 0], all_maps[torch.arange(3), best])
        torch.testing.assert_close(class_activation_maps(model, x, 7), all_maps[:, 7:8])
        rows = torch.tensor([[1, 2], [3, 4], [5, 6]])
        found = class_activation_maps(model, x, rows)
        torch.testing.assert_close(found[1], all_maps[1, 3:5])

    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            ([1000], "pass indices from 0 to 999"),
            (-1, r"classes has \[-1\]"),
            (1.5, "dtype float32"),
            ("cat", "pass indices"),
            (torch.zeros(2, 4, dtype=torch.int64), r"integer tensor \[3, K\]"),
            ([], r"shape \[3, 0\]"),
        ],
    )
    def test_classes_that_there_are_not(self, model: fastres.Model, x: Tensor, classes: object, message: str) -> None:
        with pytest.raises(InputError, match=message):
            class_activation_maps(model, x, classes)  # type: ignore[arg-type]

    def test_needs_a_classifier(self) -> None:
        headless = fastres.load("resnet18", None, num_classes=0)
        with pytest.raises(ClassifierError, match=r"model\.embed"):
            class_activation_maps(headless, torch.zeros(1, 3, 64, 64), 0)
        for draw in (look, cam_figure):
            with pytest.raises(ClassifierError, match=r"model\.embed"):
                draw(headless, np.zeros((64, 64), np.uint8))


class TestPlaces:
    def test_cells_are_centred_on_multiples_of_the_stride(self) -> None:
        maps = torch.randn(2, 3, 4, 5)
        image = at_pixels(maps, 32, (128, 160))
        assert image.shape == (2, 3, 128, 160)
        torch.testing.assert_close(image[..., ::32, ::32], maps)
        torch.testing.assert_close(image[..., 16, 0], (maps[..., 0, 0] + maps[..., 1, 0]) / 2)
        torch.testing.assert_close(image[..., 127, 159], maps[..., 3, 4])

    @pytest.mark.parametrize(("row", "column"), [(80, 144), (144, 96), (112, 112)])
    def test_a_change_shows_where_it_was_made(self, row: int, column: int) -> None:
        """A bright spot changes the last stage around its own place, not half a cell off, judged by the centroid."""
        errors = []
        for seed in range(3):
            module = calibrated(get_architecture("resnet18"), seed=seed)
            model = fastres.load("resnet18", module.state_dict())
            x = smooth_images(4, 224, 224, seed=seed)
            spot = x.clone()
            spot[..., row - 4 : row + 5, column - 4 : column + 5] += 1.0
            before, after = (model.features(image, ["layer4"])["layer4"] for image in (x, spot))
            change = at_pixels((after - before).square().sum(1, keepdim=True), 32, (224, 224)).sum((0, 1))
            places = torch.arange(224.0)
            centre = torch.stack([(change.sum(1) * places).sum(), (change.sum(0) * places).sum()]) / change.sum()
            errors.append(centre - torch.tensor([float(row), float(column)]))
        assert torch.stack(errors).mean(0).abs().max() < 8, "half a cell is 15.5 pixels"

    @pytest.mark.parametrize(("height", "width"), [(427, 640), (640, 427), (8, 8), (100, 300)])
    @pytest.mark.parametrize(("resize", "crop"), [(256, 224), (232, 224), (32, 32), (64, 96)])
    def test_crop_box_is_what_the_crop_keeps(self, height: int, width: int, resize: int, crop: int) -> None:
        """Each pixel of a crop comes from the place that the box gives. The pixels hold their own coordinates."""
        transforms = Transforms(resize=resize, crop=crop)
        rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        image = torch.stack([rows / height, columns / width, torch.ones(height, width)])
        kept = transforms._cropped(image)
        left, top, right, bottom = transforms.crop_box(height, width)
        steps = (torch.arange(crop) + 0.5) / crop
        inside = kept[2] > 0.999
        inside[[0, -1]] = False
        inside[:, [0, -1]] = False
        scale = max(1.0, (right - left) / crop)  # an antialiased edge pixel is the mean of its neighbourhood
        expected_rows = (top + steps * (bottom - top))[:, None].expand(crop, crop).clamp(0.5, height - 0.5)
        expected_columns = (left + steps * (right - left))[None].expand(crop, crop).clamp(0.5, width - 0.5)
        assert float((kept[0] * height - expected_rows)[inside].abs().max()) < 0.6 * scale
        assert float((kept[1] * width - expected_columns)[inside].abs().max()) < 0.6 * scale


class TestFigures:
    def test_look_at_a_digit(self, digits: fastres.Model, tmp_path: Path) -> None:
        scans, labels = load_scans()
        figure = look(digits, as_image(scans[3]))
        texts = [text.get_text() for axis in _axes(figure) for text in (axis.title, axis._left_title, *axis.texts)]
        assert any(text.startswith(f"{labels[3]}\n") for text in texts)
        for words in ("photograph", "first filters", "layer3 features", "classes"):
            assert any(text.startswith(words) for text in texts), words
        assert "64" in next(text for text in texts if text.startswith("9 of 64"))
        figure.savefig(tmp_path / "look.png")
        assert Image.open(tmp_path / "look.png").width == 1600

    def test_overlays_lie_on_the_crop(self, model: fastres.Model, flower: np.ndarray) -> None:
        figure = cam_figure(model, flower, top_k=2)
        panels = [axis for axis in _axes(figure) if len(axis.images) == 2]
        assert len(panels) == 2
        left, top, right, bottom = model.transforms.crop_box(427, 640)
        for axis in panels:
            photograph, overlay = axis.images
            assert tuple(photograph.get_extent()) == (0, 640, 427, 0)
            assert tuple(overlay.get_extent()) == (left, right, bottom, top)
            assert axis.get_xlim() == (0, 640)
            assert axis.get_ylim() == (427, 0)
        predictions = model.predict(flower, top_k=2)
        for axis, prediction in zip(panels, predictions, strict=True):
            assert axis.get_title(loc="left").startswith(prediction.label)
        maps = class_activation_maps(model, model.transforms.pixels(flower)[None], [p.index for p in predictions])
        heat = at_pixels(maps, 32, (224, 224))[0].numpy()
        for axis, expected in zip(panels, heat, strict=True):
            np.testing.assert_allclose(axis.images[1].get_array(), expected, rtol=1e-5, atol=1e-6)

    def test_features_and_filters(self, model: fastres.Model, flower: np.ndarray) -> None:
        figure = features_figure(model, flower, channels=4)
        titles = [axis.get_title(loc="left").strip() for axis in _axes(figure)]
        assert titles == [f"{name} features" for name in ("stem", "layer1", "layer2", "layer3", "layer4")]
        (axis,) = _axes(filters_figure(model))
        picture = axis.images[0].get_array()
        weight = model.state_dict()["conv1.weight"][9].permute(1, 2, 0)
        tile = 0.5 + weight / (2 * weight.abs().max())
        np.testing.assert_allclose(picture[59 : 59 + 56 : 8, 59 : 59 + 56 : 8], tile.numpy(), rtol=1e-5)

    @pytest.mark.parametrize("kind", ["grey", "path", "tensor", "rgba"])
    def test_kinds_of_images(self, digits: fastres.Model, flower: np.ndarray, kind: str, tmp_path: Path) -> None:
        path = tmp_path / "flower.jpg"
        Image.fromarray(flower).save(path)
        image = {
            "grey": flower.mean(2).astype(np.uint8),
            "path": path,
            "tensor": torch.from_numpy(flower.copy()).permute(2, 0, 1),
            "rgba": Image.fromarray(flower).convert("RGBA"),
        }[kind]
        figure = look(digits, image)
        assert isinstance(figure, Figure)
        assert ("flower.jpg" in figure._suptitle.get_text()) == (kind == "path")

    def test_top_k_may_exceed_the_classes(self, flower: np.ndarray) -> None:
        model = fastres.load("resnet18", None, num_classes=2)
        assert isinstance(look(model, flower, top_k=9), Figure)

    def test_mosaic(self) -> None:
        tiles = np.arange(3, dtype=np.float32)[:, None, None] * np.ones((3, 60, 60), np.float32)
        picture = mosaic(tiles)
        assert picture.shape == (123, 123)
        assert [picture[0, 0], picture[0, 63], picture[63, 0]] == [0, 1, 2]
        assert np.isnan(picture[0, 61])
        assert np.isnan(picture[63, 63])

    def test_pyplot_is_left_alone(self) -> None:
        code = (
            "import sys, numpy as np, fastres; from fastres.look import look; "
            "look(fastres.load('resnet20_digits'), np.zeros((8, 8), np.uint8)); "
            "print('matplotlib.pyplot' in sys.modules)"
        )
        result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert result.stdout.strip() == "False"

    def test_bad_input(self, digits: fastres.Model, flower: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(InputError, match="top_k is 0"):
            look(digits, flower, top_k=0)
        with pytest.raises(InputError, match="channels is 0"):
            features_figure(digits, flower, channels=0)
        with pytest.raises(ImageError, match="is a batch"):
            look(digits, flower[None])
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match=r"pip install .*\[look\]'"):
            filters_figure(digits)


class TestCommand:
    @pytest.fixture
    def scan(self, tmp_path: Path) -> Path:
        path = tmp_path / "three.png"
        as_image(load_scans()[0][3]).save(path)
        return path

    def test_writes_the_picture(self, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "look.png"
        assert main(["look", str(scan), "--model", "resnet20_digits", "-o", str(out), "--top-k", "2"]) == 0
        assert Image.open(out).width == 1600
        assert str(out) in capsys.readouterr().out
        assert sorted(path.name for path in tmp_path.iterdir()) == ["look.png", "three.png"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["-o", "look.gif"], "ends in .png, .jpg"),
            (["-o", "no/such/folder/look.png"], "does not exist"),
            (["--top-k", "0"], "--top-k is 0"),
            (["--model", "resnet5o"], "Did you mean"),
        ],
    )
    def test_errors(self, arguments: list[str], message: str, scan: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["look", str(scan), "--model", "resnet20_digits", *arguments]) == 2
        assert message in capsys.readouterr().err

    def test_missing_image(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["look", "missing.jpg"]) == 2
        assert "missing.jpg" in capsys.readouterr().err

    def test_a_full_disk_leaves_nothing(
        self, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
        assert main(["look", str(scan), "--model", "resnet20_digits", "-o", str(tmp_path / "look.png")]) == 2
        assert "No space left" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["three.png"]


def _axes(figure: Figure) -> list:  # type: ignore[type-arg]
    """Return all axes, including those of sub-figures, without colour bars."""
    return [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
