"""Decode an image file to the pixels that a model takes, either exactly as ``model.predict`` does or faster.

``exact`` uses only Pillow. ``fast`` decodes JPEG with libjpeg-turbo through simplejpeg and resizes with PyTorch's
vectorised uint8 kernel. A JPEG with a short side of at least four times the model's resize is decoded at 1/2, 1/4 or
1/8 of its size, directly by the inverse DCT; the decoded short side is still at least twice the resize.

What holds for every file, sound or damaged:

- Both decoders accept and reject the same files, with the same messages. ``fast`` passes other formats, CMYK and JPEGs
  about which libjpeg-turbo warns to Pillow.
- Before the resize, the pixels are equal to Pillow's: those of the image at its full size, or those of
  ``Image.draft`` at the fraction. The resize adds one grey level at most (two for ``bicubic``).

So the pixels of both decoders are within one grey level unless the JPEG is decoded at a fraction. Then the high
frequencies make a difference: less than one level on average on photographs, more on small print and line art.
Damage that leaves a valid JPEG goes unnoticed, by libjpeg-turbo and so by Pillow, which uses it. At a fraction it can
make any difference. A JPEG with tables that encoders do not write (:mod:`fastres.images.jpeg_structure`) is therefore
decoded whole, which leaves fewer than one in a hundred damaged files. (docs/classify.md has the measurements.)
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastres.errors import InputError
from fastres.files import open_regular

from .decoding import load_image, orientation
from .jpeg_structure import MAX_SCANS, count_scans, plausible
from .transforms import MAX_RESIZED_PIXELS, Transforms, crop_start, cropped, resized_size

EXACT, FAST = DECODERS = ("exact", "fast")
Decoder = Callable[["str | bytes", Transforms], Tensor]

# A JPEG is decoded at a fraction of its size only if at least this many times the resized size remain, so that the
# resize still averages out aliasing. The pixels of eleven photographs changed by 0.8 grey levels on average with
# a margin of 1, and by 0.2 with 2 (2026-11-23).
MARGIN = 2
FRACTIONS = (8, 4, 2)  # other fractions have no vectorised inverse DCT and take longer than the whole image
_FIRST_BYTES = b"\xff\xd8\xff"
LARGEST_FILE = 1 << 30  # Pillow reads larger ones piece by piece


def check_decoder(name: str) -> None:
    """Raise ``InputError`` if ``name`` is none of ``DECODERS``."""
    if name not in DECODERS:
        raise InputError(f"decoder is {name!r}; use {' or '.join(map(repr, DECODERS))}")


def decoder(name: str) -> Decoder:
    """Return the function ``(path or file's bytes, transforms) -> uint8 [3, crop, crop]`` of one of ``DECODERS``.

    It raises ``ImageError`` for images that :func:`fastres.images.load_image` rejects.
    """
    return {EXACT: exact_pixels, FAST: fast_pixels}[name]


def exact_pixels(source: str | bytes, transforms: Transforms) -> Tensor:
    """Return raw RGB, uint8 ``[3, crop, crop]``, exactly the pixels that ``model.predict`` uses."""
    return transforms.pixels(source)


def fast_pixels(source: str | bytes, transforms: Transforms) -> Tensor:
    """Return raw RGB, uint8 ``[3, crop, crop]``, close to :func:`exact_pixels`; see the module's documentation."""
    fraction, turn, pixels = 1, None, None
    with suppress(Exception):
        if (data := _content(source)) is not None:
            image: Image.Image = Image.open(io.BytesIO(data))
            fraction = _fraction(image, transforms.resize, data)
            turn = orientation(image)
            pixels = _decoded_jpeg(data, image, fraction)
    if pixels is None:  # not a JPEG, or a damaged one: Pillow reads it or raises the error
        image, fraction, turn = load_image(source), 1, None
        pixels = np.array(image)
    new = resized_size(image.height, image.width, transforms.resize)
    if new[0] * new[1] > MAX_RESIZED_PIXELS:
        return transforms.pixels(source)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)  # [3, H, W], channels last
    resized = _resized(tensor, (image.height, image.width), new, fraction, transforms.interpolation)
    if turn is not None:
        resized = torch.from_numpy(np.array(_to_pil(resized).transpose(turn))).permute(2, 0, 1)
    top, left = (crop_start(length, transforms.crop, transforms.crop_rounding) for length in resized.shape[1:])
    return cropped(resized, top, left, transforms.crop)


def _content(source: str | bytes) -> bytes | None:
    """Return the content of a JPEG, or ``None`` for other formats."""
    if isinstance(source, bytes):
        return source if source.startswith(_FIRST_BYTES) else None
    with open_regular(source) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_FILE or file.read(len(_FIRST_BYTES)) != _FIRST_BYTES:
            return None
        file.seek(0)
        return file.read(size)


def _fraction(image: Image.Image, resize: int, data: bytes) -> int:
    """Return f, for decoding the JPEG ``data`` with header ``image`` at 1/f of its size: 1, 2, 4 or 8."""
    fraction = next((f for f in FRACTIONS if min(image.size) >= f * MARGIN * resize), 1)
    return fraction if fraction == 1 or plausible(data) else 1


def _decoded_jpeg(data: bytes, image: Image.Image, fraction: int) -> np.ndarray | None:
    """Return RGB ``[h, w, 3]`` of the JPEG with header ``image``, not rotated; h and w are rounded up.

    Returns ``None`` for other formats, for four channels, and if there are too many scans. Raises ``ValueError`` if
    libjpeg-turbo warns.
    """
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    if image.info.get("progressive") and count_scans(data) > MAX_SCANS:
        return None
    import simplejpeg

    height, width = (-(-length // fraction) for length in (image.height, image.width))
    decoded: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    return decoded if decoded.shape == (height, width, 3) else None


def _resized(tensor: Tensor, size: tuple[int, int], new: tuple[int, int], fraction: int, interpolation: str) -> Tensor:
    """Resize ``tensor`` ``[3, h, w]``, which is 1/``fraction`` of an image of ``size``, to ``new``."""
    # The last of the h rows may cover less than ``fraction`` rows of the image, so the ratio uses the image's size, not
    # h. It is increased by the possible rounding of float64, because PyTorch rounds h times the ratio down.
    ratios = [after * fraction / before * (1 + 1e-9) for before, after in zip(size, new, strict=True)]
    resized = F.interpolate(
        tensor[None], scale_factor=ratios, mode=interpolation, antialias=True, recompute_scale_factor=False
    )[0]
    assert resized.shape[1:] == new
    return resized


def _to_pil(tensor: Tensor) -> Image.Image:
    return Image.fromarray(tensor.permute(1, 2, 0).contiguous().numpy())
