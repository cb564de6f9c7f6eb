"""fastres.images.jpeg: the fast decoder gives the same pixels and errors as the exact one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastres.errors import ImageError
from fastres.images.jpeg import exact_pixels, fast_pixels
from fastres.images.transforms import Transforms
from tests.classification.conftest import encoded

TRANSFORMS = Transforms(resize=256, crop=224)


def differences(data: bytes | str, transforms: Transforms = TRANSFORMS) -> torch.Tensor:
    exact, fast = exact_pixels(data, transforms), fast_pixels(data, transforms)
    assert fast.shape == exact.shape == (3, transforms.crop, transforms.crop)
    assert fast.dtype == torch.uint8
    assert exact.float().std() > 10  # not a uniform colour, which would hide mistakes
    return (fast.int() - exact.int()).abs()


def test_exact_is_what_predict_sees(photos: list[Image.Image]) -> None:
    data = encoded(photos[0])
    assert torch.equal(exact_pixels(data, TRANSFORMS), TRANSFORMS.batch([data])[0])


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (301, 299), (90, 70), (1023, 1023)])
@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 75, "subsampling": 0}, {"progressive": True}])
def test_within_one_level_below_four_times_the_size(
    photos: list[Image.Image], size: tuple[int, int], options: dict[str, object]
) -> None:
    found = differences(encoded(photos[1].resize(size), **options))
    assert int(found.max()) <= 1
    assert float(found.float().mean()) < 0.02


@pytest.mark.parametrize("size", [(1600, 1024), (1601, 2403), (2400, 2049)])
def test_scaled_decoding_stays_within_a_level_on_average(photos: list[Image.Image], size: tuple[int, int]) -> None:
    found = differences(encoded(photos[0].resize(size, Image.Resampling.BICUBIC), quality=90))
    assert int(found.max()) > 1  # it was scaled: otherwise this tests nothing
    assert float(found.float().mean()) < 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(photos: list[Image.Image], orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    found = differences(
        encoded(photos[0].resize((331, 277)), exif=exif)
    )  # odd: a crop before the rotation would be off
    assert int(found.max()) <= 1


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_jpeg_modes(photos: list[Image.Image], mode: str) -> None:
    assert int(differences(encoded(photos[0].convert(mode))).max()) <= 1


@pytest.mark.parametrize(
    ("mode", "format"), [("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("RGB", "WEBP"), ("P", "GIF"), ("I;16", "TIFF")]
)
def test_other_formats(photos: list[Image.Image], mode: str, format: str) -> None:
    image = photos[0]
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    assert int(differences(encoded(image, format)).max()) <= 1


def test_small_target_and_padding(photos: list[Image.Image]) -> None:
    found = differences(encoded(photos[0]), Transforms(resize=32, crop=32))  # 427 → 1/4 → 107 → 32
    assert float(found.float().mean()) < 1
    padded = Transforms(resize=40, crop=64)
    assert int(differences(encoded(photos[0].resize((90, 60))), padded).max()) <= 1


@pytest.mark.parametrize("size", [(640, 427), (255, 401)])
def test_bicubic_and_rounding_down(photos: list[Image.Image], size: tuple[int, int]) -> None:
    transforms = Transforms(resize=235, crop=224, interpolation="bicubic", crop_rounding="down")
    found = differences(encoded(photos[0].resize(size)), transforms)
    assert int(found.max()) <= 2  # the overshoot is rounded twice
    assert float(found.float().mean()) < 0.05


def test_very_long_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (2, 3000, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels))
    assert torch.equal(exact_pixels(data, TRANSFORMS), fast_pixels(data, TRANSFORMS))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
def test_truncated_files_are_refused_in_the_same_words(photos: list[Image.Image], share: float, tmp_path: Path) -> None:
    data = encoded(photos[0])
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: int(len(data) * share)])
    messages = []
    for function in (exact_pixels, fast_pixels):
        with pytest.raises(ImageError, match=r"cut\.jpg") as caught:
            function(str(path), TRANSFORMS)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        fast_pixels(str(tmp_path / "gone.jpg"), TRANSFORMS)


def test_oversized_image_is_refused(photos: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="MAX_IMAGE_PIXELS"):
        fast_pixels(encoded(photos[0]), TRANSFORMS)


def test_damage_that_pillow_reads_over_is_read(photos: list[Image.Image]) -> None:
    data = bytearray(encoded(photos[0]))
    data[-2:] = b"xx\xff\xd9"  # extra bytes: libjpeg warns and continues
    assert torch.equal(exact_pixels(bytes(data), TRANSFORMS), TRANSFORMS.pixels(bytes(data)))
    assert int(differences(bytes(data)).max()) <= 1
