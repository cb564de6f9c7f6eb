"""fastres.images.jpeg: what the two decoders make of damaged JPEGs, with a fixed seed."""

from __future__ import annotations

import io
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fastres.errors import ImageError
from fastres.images import jpeg
from fastres.images.jpeg import exact_pixels, fast_pixels
from fastres.images.jpeg_structure import MAX_SCANS, count_scans, plausible
from fastres.images.transforms import Transforms

from .damage import damaged, encoded, picture, segments, sound_jpegs

pytest.importorskip("simplejpeg")

MUTANTS = 3000
# Of 300 × 260 pixels: decoded at 1/8, 1/4, 1/2 and at the full size.
TRANSFORMS = [Transforms(resize=resize, crop=min(resize, 64)) for resize in (16, 32, 64, 100)]


def attempt(decode: jpeg.Decoder, data: bytes, transforms: Transforms) -> torch.Tensor | str:
    try:
        return decode(data, transforms)
    except ImageError as error:
        return str(error)


def decoded_by_pillow(data: bytes, fraction: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    if fraction > 1:
        image.draft(None, (image.width // fraction, image.height // fraction))
    return np.asarray(image.convert("RGB"))


class Fast:
    """Decodes, and notes what libjpeg-turbo decoded, and at what fraction."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoded: np.ndarray | None = None
        self.fraction = 1
        decode = jpeg._decoded_jpeg

        def noted(data: bytes, image: Image.Image, fraction: int) -> np.ndarray | None:
            self.fraction = fraction
            self.decoded = decode(data, image, fraction)
            return self.decoded

        monkeypatch.setattr(jpeg, "_decoded_jpeg", noted)

    def __call__(self, data: bytes, transforms: Transforms) -> torch.Tensor:
        self.decoded = None
        return fast_pixels(data, transforms)


def test_the_rule_holds_for_damaged_files(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings.filterwarnings("ignore", module=r"PIL\.")
    files, fast = sound_jpegs(), Fast(monkeypatch)
    whole = scaled = far = refused = 0
    for seed in range(MUTANTS):
        dice = random.Random(seed)
        name, transforms = dice.choice(list(files)), dice.choice(TRANSFORMS)
        data = damaged(files[name], dice, header=segments(files[name])[-1][1] + 40)
        expected, found = attempt(exact_pixels, data, transforms), attempt(fast, data, transforms)
        if isinstance(expected, str) or isinstance(found, str):
            assert expected == found, (seed, name)
            refused += 1
            continue
        difference = (expected.int() - found.int()).abs().float()
        if fast.decoded is None or fast.fraction == 1:
            assert float(difference.max()) <= 1, (seed, name)
            whole += fast.decoded is not None
        else:
            scaled += 1
            far += float(difference.mean()) >= 1
        if fast.decoded is not None and fast.fraction > 1:
            assert np.array_equal(fast.decoded, decoded_by_pillow(data, fast.fraction)), (seed, name)
    assert min(whole, scaled, refused) > MUTANTS / 10
    assert far < scaled / 100


def test_tables_that_encoders_write_are_plausible() -> None:
    image = picture(32, 32)
    for quality in (*range(1, 101), "web_low", "web_maximum", "low", "high", "maximum"):
        for options in ({}, {"progressive": True}, {"optimize": True}):
            assert plausible(encoded(image, quality=quality, **options)), (quality, options)
    assert all(map(plausible, sound_jpegs().values()))


def place_of(data: bytes, marker: int) -> int:
    """Return where the content of the first segment with ``marker`` begins."""
    return next(start + 4 for start, _ in segments(data) if data[start + 1] == marker)


@pytest.mark.parametrize(
    ("marker", "offset", "value"),
    [
        (0xDB, 40, 0),  # a frequency that has no amplitude
        (0xDB, 64, 1),
        (0xDB, 20, 255),
        (0xC4, 20, 12),  # a DC coefficient of 12 bits
        (0xC4, 20, 4),  # a symbol twice
    ],
)
def test_damaged_tables_are_decoded_whole(
    marker: int, offset: int, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(sound_jpegs()["baseline"])
    fast = Fast(monkeypatch)
    fast(bytes(data), TRANSFORMS[0])
    assert fast.fraction == 8
    data[place_of(bytes(data), marker) + offset] = value
    expected, found = attempt(exact_pixels, bytes(data), TRANSFORMS[0]), attempt(fast, bytes(data), TRANSFORMS[0])
    assert fast.fraction == 1
    assert isinstance(expected, torch.Tensor)
    assert isinstance(found, torch.Tensor)
    assert int((expected.int() - found.int()).abs().max()) <= 1


def test_many_scans_are_refused() -> None:
    data = encoded(picture(64, 64, "L"), progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:-2] + data[last:-2] * MAX_SCANS + b"\xff\xd9"
    messages = {attempt(decode, bomb, TRANSFORMS[0]) for decode in (exact_pixels, fast_pixels)}
    assert len(messages) == 1
    assert "scans" in str(messages.pop())
    trailing = data + b"\xff\xda" * 2 * MAX_SCANS  # a film beside the photograph, for example
    assert count_scans(trailing) == count_scans(data) < 20
    assert not isinstance(attempt(fast_pixels, trailing, TRANSFORMS[0]), str)
