"""fastres.images.decoding: damaged files of every format give an image or an ImageError, with a fixed seed."""

from __future__ import annotations

import random
import struct
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from fastres.errors import ImageError
from fastres.images.decoding import load_image
from fastres.images.jpeg import fast_pixels
from fastres.images.transforms import Transforms

from .damage import damaged, encoded, picture

MUTANTS = 1500
SIZE = WIDTH, HEIGHT = 61, 47

SAVED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "PNG": [(mode, {}) for mode in ("RGB", "L", "P", "RGBA", "1", "I;16")],
    "GIF": [("P", {}), ("P", {"save_all": True})],
    "WEBP": [("RGB", {}), ("RGBA", {"lossless": True}), ("RGB", {"save_all": True})],
    "BMP": [("RGB", {}), ("P", {})],
    "PPM": [("RGB", {}), ("1", {})],
    "ICO": [("RGBA", {})],
    "JPEG2000": [("RGB", {})],
    "TGA": [("RGB", {}), ("P", {"compression": "tga_rle"})],
    "PCX": [("RGB", {}), ("1", {})],
    "DDS": [("RGB", {})],
    "EPS": [("RGB", {})],
    "AVIF": [("RGB", {})],
    "SGI": [("RGB", {})],
    "QOI": [("RGB", {})],
    "ICNS": [("RGBA", {})],
    # Without compressions of libtiff, which prints about damage by itself.
    "TIFF": [("RGB", {}), ("I;16", {}), ("F", {}), ("CMYK", {}), ("RGB", {"save_all": True})],
}


def samples() -> dict[str, bytes]:
    """Return sound files; formats that Pillow was built without are left out."""
    grey = np.asarray(picture(*SIZE, "L"))
    modes = {"I;16": Image.fromarray(grey.astype(np.uint16) * 257), "F": Image.fromarray(grey.astype(np.float32) / 255)}
    files = {"PSD": photoshop(), "XPM": b'/* XPM */\nstatic char * x[] = {\n"2 1 1 1",\n"a c #F00",\n"aa"};\n'}
    names = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
    for format, ways in SAVED.items():
        if format in names and not features.check(names[format]):
            continue
        for mode, options in ways:
            image = modes.get(mode) or picture(*SIZE).convert(mode)
            more = {"append_images": [image.rotate(90)]} if options.get("save_all") else {}
            files[f"{format} {mode} {options}"] = encoded(image, format, **options, **more)
    return files


def photoshop() -> bytes:
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, HEIGHT, WIDTH, 8, 3) + bytes(12) + b"\0\0"
    return header + np.asarray(picture(*SIZE)).transpose(2, 0, 1).tobytes()


def refusal(read: Callable[[bytes], Any], data: bytes) -> str | None:
    """Return the message of an ``ImageError``; any other exception is a failure."""
    try:
        read(data)
    except ImageError as error:
        return str(error)
    return None


def test_only_image_errors_come_out() -> None:
    warnings.filterwarnings("ignore", module=r"PIL\.")
    files, transforms = samples(), Transforms(resize=16, crop=16)
    names, read = list(files), 0
    for seed in range(MUTANTS):
        dice = random.Random(seed)
        name = dice.choice(names)
        data = damaged(files[name], dice, header=dice.choice((40, 200)))
        message = refusal(load_image, data)
        read += message is None
        if seed % 4 == 0:
            assert refusal(lambda data: fast_pixels(data, transforms), data) == message, (seed, name)
    assert MUTANTS / 5 < read < MUTANTS * 4 / 5


def test_ghostscript_is_never_started(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "has_ghostscript", lambda: pytest.fail("looked for Ghostscript"))
    postscript = encoded(picture(*SIZE), "EPS")
    with pytest.raises(ImageError, match="EPS, which can start other programs; convert it to PNG"):
        load_image(postscript)
    with pytest.raises(ImageError, match="IPTC, which can start other programs"):
        load_image(iptc(postscript))


def iptc(data: bytes) -> bytes:
    """Return an IPTC file that contains an image."""

    def field(record: int, number: int, content: bytes) -> bytes:
        return struct.pack(">BBBH", 0x1C, record, number, len(content)) + content

    header = field(3, 60, b"\1\0") + field(3, 65, b"\0\1") + field(3, 120, b"\5")
    size = field(3, 20, struct.pack(">H", WIDTH)) + field(3, 30, struct.pack(">H", HEIGHT))
    return size + header + field(8, 10, data)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_large_images_are_refused_by_both_decoders(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("L", (1600, 1500)), format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    messages = []
    for transforms in (Transforms(resize=16, crop=16), Transforms(resize=900, crop=16)):  # at 1/8, at the full size
        for decode in (transforms.pixels, lambda data, transforms=transforms: fast_pixels(data, transforms)):
            with pytest.raises(ImageError, match="MAX_IMAGE_PIXELS") as caught:
                decode(data)
            messages.append(str(caught.value))
    assert len(set(messages)) == 1
