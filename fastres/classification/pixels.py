"""An image file → the pixels that a model takes, exactly as ``model.predict`` has them or faster.

``exact`` is Pillow from end to end. ``fast`` decodes JPEG with libjpeg-turbo through simplejpeg and resizes with
PyTorch's vectorised uint8 kernel: the same pixels within one grey level. A JPEG whose short side is at least four times
what the model's resize asks for is decoded at 1/2, 1/4 or 1/8 of its size, at least twice what is asked for, by the
inverse DCT itself; that moves pixels by less than one grey level on average. (docs/classify.md has the measurements.)

What Pillow refuses is refused, with Pillow's reason, and what it reads is read: other formats, CMYK and
JPEGs that libjpeg-turbo warns about are left to it.
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

from fastres.images.decoding import load_image, orientation
from fastres.images.transforms import MAX_RESIZED_PIXELS, Transforms, crop_start, cropped, resized_size

EXACT, FAST = DECODERS = ("exact", "fast")
Decoder = Callable[["str | bytes", Transforms], Tensor]

# A JPEG is decoded at a fraction of its size only while this many times the resized size remain, so that the resize
# still averages what aliases. Eleven photographs moved by 0.8 grey levels on average at 1, by 0.2 at 2 (2026-11-23).
MARGIN = 2
FRACTIONS = (8, 4, 2)  # others have no vectorised inverse DCT and take longer than the whole image


def decoder(name: str) -> Decoder:
    """The function ``(path or file's bytes, transforms) -> uint8 [3, crop, crop]`` of one of ``DECODERS``.

    It raises ``ImageError`` for what :func:`fastres.images.load_image` refuses.
    """
    return {EXACT: exact_pixels, FAST: fast_pixels}[name]


def exact_pixels(source: str | bytes, transforms: Transforms) -> Tensor:
    """Raw RGB, uint8 ``[3, crop, crop]``, to the last bit what ``model.predict`` sees."""
    return transforms.pixels(source)


def fast_pixels(source: str | bytes, transforms: Transforms) -> Tensor:
    """Raw RGB, uint8 ``[3, crop, crop]``, close to :func:`exact_pixels`; see the module."""
    fraction, turn = 1, None
    try:
        data = source if isinstance(source, bytes) else _content(source)
        image: Image.Image = Image.open(io.BytesIO(data))
        fraction = _fraction(image, transforms.resize)
        pixels = _decoded_jpeg(data, image, fraction)
        turn = orientation(image)
    except Exception:
        pixels = None
    if pixels is None:  # no JPEG, or a damaged one: Pillow decides, and words the refusal
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
    """The fraction of its size, 1/1 to 1/8, that a JPEG is decoded at."""
    return next((f for f in FRACTIONS if min(image.size) >= f * MARGIN * resize), 1)


def _decoded_jpeg(data: bytes, image: Image.Image, fraction: int) -> np.ndarray | None:
    """RGB ``[h, w, 3]`` of the JPEG that ``image`` is the header of, not turned; h and w are rounded up.

    ``None`` for other formats and for four channels. Raises ``ValueError`` for whatever libjpeg-turbo warns about.
    """
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    import simplejpeg

    height, width = (-(-length // fraction) for length in (image.height, image.width))
    decoded: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    return decoded


def _resized(tensor: Tensor, size: tuple[int, int], new: tuple[int, int], fraction: int, interpolation: str) -> Tensor:
    """``tensor`` ``[3, h, w]``, 1/``fraction`` of an image of ``size``, resized to ``new`` as that image would be."""
    # The last of the h rows may stand for less than a row of the image: the ratio is the image's, not h's. It is
    # raised by what float64 may have rounded off, because PyTorch rounds h times the ratio down.
    ratios = [after * fraction / before * (1 + 1e-9) for before, after in zip(size, new, strict=True)]
    resized = F.interpolate(
        tensor[None], scale_factor=ratios, mode=interpolation, antialias=True, recompute_scale_factor=False
    )[0]
    assert resized.shape[1:] == new
    return resized


def _to_pil(tensor: Tensor) -> Image.Image:
    return Image.fromarray(tensor.permute(1, 2, 0).contiguous().numpy())
