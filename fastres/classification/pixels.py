"""An image file → the pixels that a model takes, exactly as ``model.predict`` has them or faster.

``exact`` is Pillow from end to end. ``fast`` decodes JPEG with libjpeg-turbo through simplejpeg and resizes with
PyTorch's vectorised uint8 kernel: the same pixels within one grey level. A JPEG whose short side is at least four times
what the model's resize asks for is decoded at 1/2, 1/4 or 1/8 of its size, at least twice what is asked for, by the
inverse DCT itself; that moves pixels by about 0.2 grey levels on average. (docs/classify.md has what was measured.)

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

from fastres.decoding import load_image, orientation
from fastres.images import MAX_RESIZED_PIXELS, Transforms, crop_start, cropped, resized_size

EXACT, FAST = DECODERS = ("exact", "fast")
Decoder = Callable[["str | bytes", Transforms], Tensor]

# A JPEG is decoded at a fraction of its size only while this many times the resized size remain, so that the resize
# still averages what aliases. At 1 pixels move by 0.8 grey levels on average, at 2 by 0.2 (AMD EPYC, 2026-11-23).
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
    try:
        data = source if isinstance(source, bytes) else _content(source)
        image = Image.open(io.BytesIO(data))
        pixels = _decoded_jpeg(data, image, transforms.resize)
    except Exception:
        pixels = None
    if pixels is None:  # no JPEG, or a damaged one: Pillow decides, and words the refusal
        image = load_image(source)
        pixels, turn = np.array(image), None
    else:
        turn = orientation(image)
    new = resized_size(image.height, image.width, transforms.resize)
    if new[0] * new[1] > MAX_RESIZED_PIXELS:
        return transforms.pixels(source)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)  # [3, H, W], channels last
    resized = F.interpolate(tensor[None], new, mode="bilinear", antialias=True)[0]
    if turn is not None:
        resized = torch.from_numpy(np.array(_to_pil(resized).transpose(turn))).permute(2, 0, 1)
    top, left = (crop_start(length, transforms.crop) for length in resized.shape[1:])
    return cropped(resized, top, left, transforms.crop)


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(os.fstat(file.fileno()).st_size)


def _decoded_jpeg(data: bytes, image: Image.Image, resize: int) -> np.ndarray | None:
    """RGB ``[h, w, 3]`` of the JPEG that ``image`` is the header of, not turned, perhaps at a fraction of its size.

    ``None`` for other formats and for four channels. Raises ``ValueError`` for whatever libjpeg-turbo warns about.
    """
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    import simplejpeg

    fraction = next((f for f in FRACTIONS if min(image.size) >= f * MARGIN * resize), 1)
    height, width = (-(-length // fraction) for length in (image.height, image.width))
    decoded: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    return decoded


def _to_pil(tensor: Tensor) -> Image.Image:
    return Image.fromarray(tensor.permute(1, 2, 0).contiguous().numpy())
