"""Turn one image into RGB pixels: a file, a PIL image, an array or a tensor.

:mod:`fastres.images.transforms` documents the conventions (layouts, ranges, alpha, orientation) and resizes the images
that this module returns.
"""

from __future__ import annotations

import io
import os
from typing import Any, BinaryIO, Union

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastres.errors import ImageError

from .jpeg_structure import MAX_SCANS, count_scans
from .opening import NamedBytes, named, open_image

ImageSource = Union[str, "os.PathLike[str]", bytes, BinaryIO, Image.Image, "np.ndarray[Any, Any]", Tensor]

ACCEPTED = (
    "a path, an open binary file or its bytes, a PIL image, an array [H, W] or [H, W, C], "
    "or a tensor [H, W] or [C, H, W]"
)
PIXEL_TYPES = "uint8 (0..255), uint16 (0..65535) or floating point (0..1)"
# Rounding in a resize may push values slightly outside 0..1. This much, less than half a grey level, is accepted.
FLOAT_SLACK = 1e-3

# To draw EPS, Pillow starts Ghostscript. IPTC may contain EPS.
OTHER_PROGRAMS = ("EPS", "IPTC")

_TIFF_BITS, _TIFF_PHOTOMETRIC, _EXIF_ORIENTATION = 258, 262, 274
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageSource) -> Image.Image:
    """Return ``source`` as an upright PIL image in mode RGB. A PIL image that is upright and RGB is returned unchanged.

    ``source`` is a path, an open binary file, the bytes of one, a PIL image, an array or a tensor.
    :mod:`fastres.images.transforms` documents their layouts and ranges. Every PIL mode is accepted. Modes deeper than 8
    bits are scaled, not clipped as ``Image.convert("RGB")`` does: ``I;16`` and ``I`` are 0..65535 (12-bit TIFFs
    0..4095) and ``F`` is 0..1.

    Raises ``ImageError``, which names the file, if it is missing, a folder, truncated, too large or not an image; if a
    string is a URL; and for arrays and tensors with an unsupported rank, size, dtype or range.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, _described(source))
    if isinstance(source, Tensor):
        return _from_array(to_uint8(checked_tensor(source)).permute(1, 2, 0).cpu().numpy())
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        label = source.label if isinstance(source, NamedBytes) else f"The given data ({len(source)} bytes)"
        return _decode(io.BytesIO(source), label)
    if isinstance(source, (str, os.PathLike)):
        return _load_file(source)
    if hasattr(source, "read"):
        return _decode(source, repr(getattr(source, "name", None) or "an open file"))
    raise ImageError(f"An image cannot be a {type(source).__name__}; pass {ACCEPTED}.")


def _load_file(source: str | os.PathLike[str]) -> Image.Image:
    with open_image(source) as file:
        return _decode(file, named(source))


def _decode(file: Any, label: str) -> Image.Image:
    """Decode the first frame of ``file``. On a damaged file, Pillow's decoders can raise any exception."""
    try:
        image = Image.open(file)
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"{label} is not an image that Pillow can read (JPEG, PNG, WebP, GIF, TIFF, BMP and others), or its "
            "first bytes are damaged; convert it, or register a plug-in for its format, such as pillow-heif."
        ) from error
    except Exception as error:
        raise _undecodable(label, error) from error
    if image.info.get("progressive") and (scans := _scans(file)) > MAX_SCANS:
        raise ImageError(
            f"{label} has {scans} scans, and would take long to decode; images have at most {MAX_SCANS}. If you trust "
            "the file, convert it to a JPEG that is not progressive."
        )
    return _to_rgb(image, label)


def _scans(file: Any) -> int:
    position = file.tell()
    file.seek(0)
    scans = count_scans(file.read())
    file.seek(position)
    return scans


def _undecodable(label: str, error: Exception) -> ImageError:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        advice = "If you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS, or make the image smaller first."
        return ImageError(f"{label} is too large: {str(error).rstrip('.')}. {advice}")
    if isinstance(error, OSError) and error.errno is not None:  # of the disk; Pillow's own have no number
        return ImageError(f"{label} cannot be read: {error.strerror}.")
    if isinstance(error, MemoryError):
        return ImageError(f"{label} needs more memory than there is; make it smaller, or decode fewer at a time.")
    reason = str(error) or type(error).__name__
    return ImageError(f"{label} cannot be decoded ({reason}): it is damaged, truncated or already closed.")


def _described(image: Image.Image) -> str:
    filename = getattr(image, "filename", "")
    return named(filename) if filename else f"A PIL image of {image.width} × {image.height}"


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    """Return ``image`` in mode RGB, rotated as its EXIF orientation says."""
    if not image.width or not image.height:
        raise ImageError(f"{label} has no pixels; pass an image of at least 1 × 1.")
    if image.format in OTHER_PROGRAMS and getattr(image, "tile", None):
        raise ImageError(f"{label} is in the format {image.format}, which can start other programs; convert it to PNG.")
    try:
        image.load()
        turn = orientation(image)
        image = _converted(image, label)
        return image if turn is None else image.transpose(turn)
    except ImageError:
        raise
    except Exception as error:
        raise _undecodable(label, error) from error


def orientation(image: Image.Image) -> Image.Transpose | None:
    """Return the transpose that turns ``image`` upright according to its EXIF, or ``None`` if it is upright."""
    try:
        return _ORIENTATIONS.get(int(image.getexif().get(_EXIF_ORIENTATION, 1)))
    except Exception:
        # Damaged metadata beside intact pixels is common. It gives no orientation, so the pixels stay as they are.
        return None


def _converted(image: Image.Image, label: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    label = f"{label} (mode {image.mode})"
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_array(_high_byte(image, label))
    if image.mode == "F":
        return _from_array(np.asarray(image), label)
    if image.mode == "La":  # Pillow has no direct conversion
        image = image.convert("LA")
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return image.convert("RGB")


def _high_byte(image: Image.Image, label: str) -> np.ndarray[Any, Any]:
    """Return the 8 high bits of a single deep channel, uint8 ``[H, W]``."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    tags = getattr(image, "tag_v2", {})
    bits = 12 if image.mode != "I" and tags.get(_TIFF_BITS) == (12,) else 16
    if low < 0 or high >= 1 << bits:
        raise ImageError(f"{label} has values from {low} to {high}; {bits}-bit grey must be 0..{(1 << bits) - 1}.")
    if image.mode == "I" and image.format not in ("PNG", "PPM") and 0 < high < 256:
        raise ImageError(
            f"{label} has no value above {high}, but Pillow uses mode I for 16-bit grey. "
            "Call image.convert('L') if it is 8-bit grey, or image.convert('I;16') if it really is this dark."
        )
    if tags.get(_TIFF_PHOTOMETRIC) == 0:  # white is zero; Pillow handles this for 8 bits only
        values = (1 << bits) - 1 - values
    return (values >> (bits - 8)).astype(np.uint8)


def _from_array(array: np.ndarray[Any, Any], label: str | None = None) -> Image.Image:
    """Return an array ``[H, W]`` or ``[H, W, C]`` as an RGB image."""
    label = label or f"An array of shape {list(array.shape)} and dtype {array.dtype}"
    _check_shape(label, array.shape, 2, "[H, W, C]", "[C, H, W]; array.transpose(1, 2, 0) converts it")
    if array.ndim == 3:
        array = array[:, :, :3] if array.shape[2] > 2 else array[:, :, 0]  # without alpha
    if array.dtype.kind == "f":
        _check_range(label, float(array.min()), float(array.max()))
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype != np.uint8:
        scale = " * 255" if array.dtype == np.bool_ else ""
        raise ImageError(f"{label} has an unsupported dtype; use {PIXEL_TYPES}, or pass array.astype('uint8'){scale}.")
    return Image.fromarray(array).convert("RGB")


def checked_tensor(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as ``[1, H, W]`` or ``[3, H, W]`` on its device, as uint8, or as float32 or float64 in 0..1.

    Raises ``ImageError`` for an unsupported rank, size, dtype or range.
    """
    label = f"A tensor of shape {list(tensor.shape)} and dtype {tensor.dtype}"
    _check_shape(label, tensor.shape, 0, "[C, H, W]", "[H, W, C]; tensor.permute(2, 0, 1) converts it")
    if tensor.layout != torch.strided:
        raise ImageError(f"{label} has the layout {tensor.layout}; pass tensor.to_dense().")
    if tensor.requires_grad:
        raise ImageError(f"{label} requires grad, but images have no gradients; pass tensor.detach().")
    if tensor.ndim == 2:
        tensor = tensor[None]
    tensor = tensor[:3] if tensor.shape[0] > 2 else tensor[:1]  # without alpha
    if tensor.is_floating_point():
        low, high = torch.aminmax(tensor.to(torch.float32))
        _check_range(label, float(low), float(high))
        return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
    if tensor.dtype == torch.uint16:
        return (tensor.to(torch.int32) >> 8).to(torch.uint8)
    if tensor.dtype != torch.uint8:
        scale = " * 255" if tensor.dtype == torch.bool else ""
        raise ImageError(f"{label} has an unsupported dtype; use {PIXEL_TYPES}, or pass tensor.to(torch.uint8){scale}.")
    return tensor


def to_uint8(pixels: Tensor) -> Tensor:
    """Return uint8 as it is, and round floating point 0..1 to 0..255; the overshoot of a bicubic resize is clipped."""
    return pixels if pixels.dtype == torch.uint8 else (pixels * 255).round().clamp(0, 255).to(torch.uint8)


def _check_shape(label: str, shape: tuple[int, ...], channels: int, layout: str, other: str) -> None:
    """Raise ``ImageError`` unless the shape is one image with 1..4 channels; ``channels`` is their axis in rank 3."""
    if len(shape) == 4:
        raise ImageError(f"{label} is a batch; pass one image, or use Transforms.batch or model.predict for batches.")
    if len(shape) not in (2, 3):
        raise ImageError(f"{label} has rank {len(shape)}; pass [H, W] or {layout}.")
    if 0 in shape:
        raise ImageError(f"{label} has no pixels; pass an image of at least 1 × 1.")
    if len(shape) == 3 and shape[channels] not in (1, 2, 3, 4):
        advice = f" This looks like {other}." if shape[2 - channels] in (1, 3, 4) else ""
        raise ImageError(f"{label} has {shape[channels]} channels; pass {layout} with 1 to 4 channels.{advice}")


def _check_range(label: str, low: float, high: float) -> None:
    """Raise ``ImageError`` for floating-point pixels outside 0..1; a NaN fails both comparisons."""
    if low >= -FLOAT_SLACK and high <= 1 + FLOAT_SLACK:
        return
    if not np.isfinite([low, high]).all():
        raise ImageError(f"{label} holds NaN or infinite values; floating-point pixels must be 0..1.")
    if low < 0:
        advice = "Pass raw pixels here. If the image is already normalised, call the model itself: model(x)."
    elif high <= 255 + FLOAT_SLACK:
        advice = "If its scale is 0..255, divide it by 255 or convert it to uint8."
    else:
        advice = "Divide it by its largest possible value."
    raise ImageError(f"{label} has values from {low:.4g} to {high:.4g}; floating-point pixels must be 0..1. {advice}")
