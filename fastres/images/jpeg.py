"""Decode an image file to the pixels that a model takes, either exactly as ``model.predict`` does or faster.

``exact`` uses only Pillow. ``fast`` decodes JPEG with libjpeg-turbo through simplejpeg and resizes with PyTorch's
vectorised uint8 kernel; the pixels are the same within one grey level. A JPEG with a short side of at least four times
the model's resize is decoded at 1/2, 1/4 or 1/8 of its size, directly by the inverse DCT; the decoded short side is
still at least twice the resize. That changes pixels by less than one grey level on average. (docs/classify.md has the
measurements.)

Both decoders accept and reject the same files, with the same messages: ``fast`` passes other formats, CMYK and JPEGs
with libjpeg-turbo warnings to Pillow.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .decoding import load_image, orientation
from .transforms import MAX_RESIZED_PIXELS, Transforms, crop_start, cropped, resized_size

EXACT, FAST = DECODERS = ("exact", "fast")
Decoder = Callable[["str | bytes", Transforms], Tensor]

# A JPEG is decoded at a fraction of its size only if at least this many times the resized size remain, so that the
# resize still averages out aliasing. The pixels of eleven photographs changed by 0.8 grey levels on average with
# a margin of 1, and by 0.2 with 2 (2026-11-23).
MARGIN = 2
FRACTIONS = (8, 4, 2)  # other fractions have no vectorised inverse DCT and take longer than the whole image


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
    fraction, turn = 1, None
    try:
        data = source if isinstance(source, bytes) else _content(source)
        image: Image.Image = Image.open(io.BytesIO(data))
        fraction = _fraction(image, transforms.resize)
        pixels = _decoded_jpeg(data, image, fraction)
        turn = orientation(image)
    except Exception:
        pixels = None
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


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(os.fstat(file.fileno()).st_size)


def _fraction(image: Image.Image, resize: int) -> int:
    """Return f, for decoding a JPEG at 1/f of its size: 1, 2, 4 or 8."""
    return next((f for f in FRACTIONS if min(image.size) >= f * MARGIN * resize), 1)


def _decoded_jpeg(data: bytes, image: Image.Image, fraction: int) -> np.ndarray | None:
    """Return RGB ``[h, w, 3]`` of the JPEG with header ``image``, not rotated; h and w are rounded up.

    Returns ``None`` for other formats and for four channels. Raises ``ValueError`` if libjpeg-turbo warns.
    """
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    import simplejpeg

    height, width = (-(-length // fraction) for length in (image.height, image.width))
    decoded: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    return decoded


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
