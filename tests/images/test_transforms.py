"""fastres.images: the transforms equal torchvision's, and a batch equals its images one by one."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastres.errors import ImageError, InputError
from fastres.images import categories, transforms
from fastres.images.transforms import Transforms, batch_sources

TRANSFORMS = Transforms(resize=232, crop=224)


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Two real photographs, 640 × 427, and one of them rotated by a quarter turn."""
    datasets = pytest.importorskip("sklearn.datasets")
    china, flower = (Image.fromarray(image) for image in datasets.load_sample_images().images)
    return [china, flower, china.transpose(Image.Transpose.ROTATE_90)]


@pytest.fixture(scope="module")
def reference() -> Callable[[Transforms], Any]:
    """torchvision's own transforms with the same settings."""
    presets = pytest.importorskip("torchvision.transforms._presets")
    from torchvision.transforms import InterpolationMode

    def build(own: Transforms) -> Any:
        return presets.ImageClassification(
            crop_size=own.crop,
            resize_size=own.resize,
            mean=own.mean,
            std=own.std,
            interpolation=InterpolationMode(own.interpolation),
            antialias=True,
        )

    return build


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def to_tensor(image: Image.Image | np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class TestAgainstTorchvision:
    def test_the_transforms_of_published_weights(self, photos: list[Image.Image]) -> None:
        models = pytest.importorskip("torchvision.models")
        for entry in (models.ResNet50_Weights.IMAGENET1K_V1, models.ResNet50_Weights.IMAGENET1K_V2):
            theirs = entry.transforms()
            own = Transforms(theirs.resize_size[0], theirs.crop_size[0])
            assert (own.resize, own.crop) in ((256, 224), (232, 224))
            for photo in photos:
                assert torch.equal(own(photo), theirs(photo))
                assert torch.equal(own(np.asarray(photo)), theirs(photo))

    def test_tensors(self, photos: list[Image.Image], reference: Any) -> None:
        theirs = reference(TRANSFORMS)
        for photo in photos:
            tensor = to_tensor(photo)
            assert torch.equal(TRANSFORMS(tensor), theirs(tensor))
            assert torch.equal(TRANSFORMS(tensor / 255), theirs(tensor / 255))
            assert torch.equal(TRANSFORMS(tensor.double() / 255), theirs(tensor.double() / 255))
            grey = tensor[:1]
            assert torch.equal(TRANSFORMS(grey), theirs(grey.expand(3, -1, -1)))

    @settings(max_examples=150, deadline=None)
    @given(
        height=st.integers(1, 90),
        width=st.integers(1, 90),
        resize=st.integers(1, 60),
        crop=st.integers(1, 70),
        seed=st.integers(0, 9),
        interpolation=st.sampled_from(["bilinear", "bicubic"]),
    )
    @example(
        height=33, width=32, resize=32, crop=32, seed=0, interpolation="bicubic"
    )  # short side already right, long side one off
    @example(height=32, width=32, resize=32, crop=32, seed=0, interpolation="bicubic")  # nothing to do
    @example(height=1, width=1, resize=1, crop=70, seed=0, interpolation="bicubic")  # nearly all padding
    @example(height=1, width=90, resize=60, crop=7, seed=0, interpolation="bicubic")
    @example(
        height=40, width=43, resize=40, crop=40, seed=0, interpolation="bicubic"
    )  # a half pixel, rounded to even: 1.5 → 2
    @example(height=40, width=45, resize=40, crop=40, seed=0, interpolation="bicubic")  # 2.5 → 2
    def test_any_size(
        self, reference: Any, height: int, width: int, resize: int, crop: int, seed: int, interpolation: Any
    ) -> None:
        own = Transforms(resize, crop, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), interpolation=interpolation)
        theirs = reference(own)
        array = noise(height, width, seed)
        image, tensor = Image.fromarray(array), to_tensor(array)
        assert torch.equal(own(image), theirs(image))
        assert torch.equal(own(tensor), theirs(tensor))
        assert torch.equal(own(tensor / 255), theirs(tensor / 255))

    @pytest.mark.parametrize("channels", [1, 2, 4])
    def test_channels_of_tensors(self, photos: list[Image.Image], channels: int) -> None:
        rgb = to_tensor(photos[0])
        tensor = torch.cat([rgb, rgb[:1].flip(1)])[[0, 3] if channels == 2 else list(range(channels))]
        expected = rgb if channels == 4 else rgb[:1].expand(3, -1, -1)
        assert torch.equal(TRANSFORMS(tensor), TRANSFORMS(expected))
        assert torch.equal(TRANSFORMS(tensor / 255), TRANSFORMS(expected / 255))

    def test_both_paths_within_one_grey_level(self, photos: list[Image.Image]) -> None:
        for photo in photos:
            by_pillow, by_torch = TRANSFORMS.pixels(photo), TRANSFORMS.pixels(to_tensor(photo))
            assert (by_pillow.int() - by_torch.int()).abs().max() <= 1

    @pytest.mark.parametrize(
        ("height", "width"), [(3, 400), (400, 3), (2, 901), (1, 333), (7, 555), (64, 48), (5, 300)]
    )
    @pytest.mark.parametrize(("resize", "crop"), [(40, 32), (32, 40), (4, 4), (3, 9)])
    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
    def test_elongated_images(
        self,
        reference: Any,
        monkeypatch: pytest.MonkeyPatch,
        height: int,
        width: int,
        resize: int,
        crop: int,
        interpolation: Any,
    ) -> None:
        own = Transforms(resize, crop, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation)
        array = noise(height, width)
        expected = [
            reference(own)(source) for source in (Image.fromarray(array), to_tensor(array), to_tensor(array) / 255)
        ]
        monkeypatch.setattr(transforms, "MAX_RESIZED_PIXELS", 0)
        monkeypatch.setattr(transforms, "_resize", None)  # only the window may be computed
        results = [own(source) for source in (array, to_tensor(array), to_tensor(array) / 255)]
        # PyTorch keeps source positions in float32, off by up to 2⁻²³ of the length. Values change by 1 per pixel.
        tolerance = max(height, width) * 2.0**-23
        for result, wanted, levels in zip(results, expected, (1, 1, 0), strict=True):
            assert (result - wanted).abs().max() <= levels / 255 + tolerance

    def test_a_very_elongated_image_takes_little_memory(self) -> None:
        array = noise(2, 100_000)  # 232 × 11.6 million pixels once resized
        result = TRANSFORMS.pixels(array)
        assert result.shape == (3, 224, 224)
        # The crop shows less than two source pixels around the middle, from row to row.
        middle = array[:, 49_998:50_002].reshape(-1, 3)
        for channel in range(3):
            assert middle[:, channel].min() <= result[channel].min()
            assert result[channel].max() <= middle[:, channel].max()
        assert torch.equal(result, TRANSFORMS.pixels(to_tensor(array)))


class TestPixels:
    def test_normalising_them_gives_the_call(self, photos: list[Image.Image]) -> None:
        pixels = TRANSFORMS.pixels(photos[0])
        assert (pixels.shape, pixels.dtype) == ((3, 224, 224), torch.uint8)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (TRANSFORMS.mean, TRANSFORMS.std))
        assert torch.equal((pixels / 255 - mean) / std, TRANSFORMS(photos[0]))
        assert TRANSFORMS(photos[0]).dtype == torch.float32

    @pytest.mark.parametrize("channels", [1, 3])
    def test_they_are_a_contiguous_copy(self, channels: int) -> None:
        own = Transforms(8, 8)
        tensor = torch.full((channels, 8, 8), 7, dtype=torch.uint8)
        pixels = own.pixels(tensor)
        assert pixels.is_contiguous()
        pixels.zero_()
        assert (tensor == 7).all()
        assert own.pixels(noise(8, 8)).is_contiguous()

    def test_small_images_are_padded_with_black(self) -> None:
        pixels = Transforms(2, 7).pixels(np.full((2, 2), 255, np.uint8))
        expected = torch.zeros(7, 7, dtype=torch.uint8)
        expected[2:4, 2:4] = 255
        assert torch.equal(pixels, expected.expand(3, -1, -1))

    def test_float_tensors_round(self) -> None:
        levels = torch.arange(256).reshape(1, 16, 16)
        assert torch.equal(
            Transforms(16, 16).pixels((levels + 0.4) / 255 * (levels < 255) + (levels == 255))[0], levels[0]
        )


class TestBatch:
    def test_it_is_the_images_one_by_one(self, photos: list[Image.Image], tmp_path: Path) -> None:
        path = tmp_path / "photo.png"
        photos[1].save(path)
        sources: list[Any] = [
            photos[0],
            path,
            np.asarray(photos[2]),
            to_tensor(photos[0]),
            path.read_bytes(),
            io.BytesIO(path.read_bytes()),
        ]
        batch = TRANSFORMS.batch(sources)
        assert (batch.shape, batch.dtype) == ((6, 3, 224, 224), torch.uint8)
        assert batch.is_contiguous(memory_format=torch.channels_last)
        for pixels, source in zip(batch, sources, strict=True):
            assert torch.equal(pixels, TRANSFORMS.pixels(source))
        assert not torch.equal(batch[0], batch[1])

    @pytest.mark.parametrize("count", [0, 1, 2, 40])
    def test_order_and_count(self, count: int, tmp_path: Path) -> None:
        own = Transforms(4, 4)
        paths = []
        for index in range(count):
            paths.append(tmp_path / f"{index}.png")
            size = (400, 400) if index % 7 == 0 else (5, 5)  # some take longer than those after them
            Image.new("L", size, 5 * index).save(paths[-1])
        batch = own.batch(paths)
        assert batch.shape == (count, 3, 4, 4)
        assert batch[:, 0, 0, 0].tolist() == [5 * index for index in range(count)]

    def test_one_lazy_image_many_times(self, photos: list[Image.Image], tmp_path: Path) -> None:
        photos[0].save(tmp_path / "a.jpg")
        expected = TRANSFORMS.pixels(tmp_path / "a.jpg")
        lazy = Image.open(tmp_path / "a.jpg")
        batch = TRANSFORMS.batch([lazy] * 12)
        assert all(torch.equal(pixels, expected) for pixels in batch)

    def test_files_are_read_by_several_threads_and_tensors_by_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: dict[type, set[int]] = {np.ndarray: set(), torch.Tensor: set()}
        meeting = threading.Barrier(2)
        raw = Transforms._raw

        def watched(self: Transforms, image: Any) -> torch.Tensor:
            seen[type(image)].add(threading.get_ident())
            if isinstance(image, np.ndarray):
                meeting.wait(timeout=20)  # returns only if two threads read at the same time
            return raw(self, image)

        monkeypatch.setattr(Transforms, "_raw", watched)
        monkeypatch.setattr(transforms.os, "cpu_count", lambda: 2)
        Transforms(4, 4).batch([noise(5, 5), noise(6, 6), to_tensor(noise(5, 5)), to_tensor(noise(6, 6))])
        assert len(seen[np.ndarray]) == 2
        assert seen[torch.Tensor] == {threading.get_ident()}

    def test_batched_arrays_and_tensors(self) -> None:
        own = Transforms(6, 5)
        array = np.stack([noise(8, 9, seed) for seed in range(3)])
        tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
        for source in (array, tensor):
            batch = own.batch(source)
            assert batch.shape == (3, 3, 5, 5)
            assert all(torch.equal(batch[i], own.pixels(source[i])) for i in range(3))

    def test_errors_say_which_image(self, tmp_path: Path) -> None:
        good = noise(5, 5)
        with pytest.raises(ImageError, match=r"^images\[2\]: .*no\.jpg' does not exist"):
            TRANSFORMS.batch([good, good, tmp_path / "no.jpg", good])
        with pytest.raises(ImageError, match=r"^images\[65\]: A tensor"):
            TRANSFORMS.batch([good, torch.zeros(3, 4, 4, dtype=torch.int64)], first_index=64)
        with pytest.raises(ImageError, match=r"^'.*no\.jpg' does not exist"):
            TRANSFORMS.batch(tmp_path / "no.jpg")

    def test_progress_only_when_asked_and_slow(self, capsys: pytest.CaptureFixture[str]) -> None:
        own = Transforms(4, 4)
        assert torch.equal(own.batch([noise(5, 5)] * 3, progress=True), own.batch([noise(5, 5)] * 3))
        assert capsys.readouterr().err == ""

    def test_progress_of_a_slow_batch(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = iter(range(1000))
        monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))
        Transforms(4, 4).batch([noise(5, 5, seed) for seed in range(6)], progress=True)
        assert "Reading images" in capsys.readouterr().err


class TestBatchSources:
    def test_one_image_of_each_kind(self, tmp_path: Path) -> None:
        array, tensor = noise(4, 4), to_tensor(noise(4, 4))
        for source in (
            "a.jpg",
            tmp_path,
            b"data",
            Image.fromarray(array),
            array,
            array[:, :, 0],
            tensor,
            io.BytesIO(b"x"),
        ):
            result = batch_sources(source)
            assert len(result) == 1
            assert result[0] is source

    def test_several(self, tmp_path: Path) -> None:
        for name in ("b.jpg", "a.jpg", "c.txt"):
            (tmp_path / name).touch()
        assert batch_sources(["a", "b"]) == ["a", "b"]
        assert batch_sources(("a", Path("b"))) == ["a", Path("b")]
        assert set(map(str, batch_sources(tmp_path.glob("*.jpg")))) == {
            str(tmp_path / "a.jpg"),
            str(tmp_path / "b.jpg"),
        }
        assert batch_sources(name for name in "ab") == ["a", "b"]
        assert batch_sources([]) == []

    def test_batches_are_split(self) -> None:
        array = np.stack([noise(4, 6, seed) for seed in range(2)])
        split: Any = batch_sources(array)
        assert [part.shape for part in split] == [(4, 6, 3)] * 2
        assert all(np.array_equal(part, whole) for part, whole in zip(split, array, strict=True))
        split = batch_sources(torch.zeros(2, 3, 4, 6))
        assert [tuple(part.shape) for part in split] == [(3, 4, 6)] * 2
        assert batch_sources(torch.zeros(0, 3, 4, 6)) == []

    @pytest.mark.parametrize("given", [None, 3, {"a": 1}, {"a.jpg"}, object()])
    def test_other_containers(self, given: Any) -> None:
        with pytest.raises(ImageError, match="or a list of these"):
            batch_sources(given)

    @pytest.mark.parametrize("item", [["b.jpg"], ("b.jpg",), np.zeros((1, 4, 4, 3)), torch.zeros(1, 3, 4, 4)])
    def test_nested(self, item: Any) -> None:
        with pytest.raises(ImageError, match=r"images\[1\] is itself a list or a batch"):
            batch_sources(["a.jpg", item])


class TestSettings:
    def test_repr_says_all(self) -> None:
        assert repr(Transforms(232, 224, [0.5, 0.5, 0.5], (1, 1, 1))) == (  # type: ignore[arg-type]
            "Transforms(resize=232, crop=224, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0), interpolation='bilinear', "
            "crop_rounding='nearest')"
        )

    def test_they_are_values(self) -> None:
        assert Transforms(232, 224) == TRANSFORMS != Transforms(256, 224)
        assert hash(Transforms(232, 224)) == hash(TRANSFORMS)
        assert pickle.loads(pickle.dumps(TRANSFORMS)) == copy.deepcopy(TRANSFORMS) == TRANSFORMS

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"resize": 0}, "resize is 0; pass a whole number"),
            ({"crop": 224.0}, r"crop is 224\.0"),
            ({"crop": True}, "crop is True"),
            ({"mean": (0.5, 0.5)}, "three finite numbers, for"),
            ({"mean": (0.5, 0.5, float("nan"))}, "three finite numbers, for"),
            ({"std": (1, 1, 0)}, "three finite numbers above 0"),
            ({"interpolation": "lanczos"}, "'lanczos'; pass 'bilinear' or 'bicubic'"),
            ({"crop_rounding": "up"}, "crop_rounding is 'up'; pass 'nearest' or 'down'"),
        ],
    )
    def test_impossible_ones(self, changes: dict[str, Any], reason: str) -> None:
        with pytest.raises(ImageError, match=reason):
            Transforms(**{"resize": 232, "crop": 224, **changes})


class TestCategories:
    def test_imagenet_is_torchvisions(self) -> None:
        models = pytest.importorskip("torchvision.models")
        names = categories.load("imagenet")
        for entry in (models.ResNet50_Weights.DEFAULT, models.ResNet18_Weights.DEFAULT):
            assert list(names) == entry.meta["categories"]
        assert categories.load("imagenet") is names

    def test_known_indices(self) -> None:
        names = categories.load("imagenet")
        assert len(names) == 1000
        assert (names[0], names[207], names[281], names[999]) == ("tench", "golden retriever", "tabby", "toilet tissue")

    def test_digits(self) -> None:
        assert categories.load("digits") == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")

    def test_unknown(self) -> None:
        with pytest.raises(InputError, match="use 'imagenet' or 'digits'"):
            categories.load("cifar")


def test_importing_images_imports_no_torchvision() -> None:
    code = "import sys, fastres.images, fastres.images.categories; print('torchvision' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
