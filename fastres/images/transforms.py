"""Preprocessing: resize, centre crop and normalise one image or many.

A :class:`Transforms` returns exactly what torchvision's ``weights.transforms()`` returns for the same RGB image, to
the last bit. Files, PIL images and arrays are resized by Pillow, tensors by PyTorch with antialiasing. Images more than
a thousand times as long as wide are the exception: their pixels agree within one grey level, because fastres resizes
only the part that it crops and so saves gigabytes.

Conventions, the same everywhere in fastres:

- Arrays are ``[H, W]`` or ``[H, W, C]``, as in PIL, scikit-image and imageio. Tensors are ``[H, W]`` or
  ``[C, H, W]``, as in torchvision. C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA).
- uint8 is 0..255, uint16 is 0..65535 (its high byte is kept), floating point is 0..1.
- Alpha is dropped, not blended, as in ``Image.convert("RGB")``. If a file has several frames, the first is read.
- The EXIF orientation of files and PIL images is applied. (``ImageOps.exif_transpose`` removes the orientation tag
  after applying it, ``Image.rotate`` does not.)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastres.errors import ImageError
from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD, Triple
from fastres.terminal import progress_bar

from .decoding import ACCEPTED, ImageSource, checked_tensor, load_image, to_uint8

__all__ = ["ImageSource", "Transforms", "batch_sources", "load_image"]

# If the resized image has more pixels than this (192 MiB of RGB; at a short side of 256, an aspect ratio above
# 1 : 1024), only the part that the crop keeps is computed.
MAX_RESIZED_PIXELS = 1 << 26
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Each thread holds one decoded photograph, 36 MB at 12 megapixels.
MAX_THREADS = 16


@dataclass(frozen=True)
class Transforms:
    """Resize the short side to ``resize``, crop the centre to ``crop`` × ``crop``, and normalise.

    ``resize`` and ``crop`` are in pixels; ``mean`` and ``std`` are per RGB channel, for pixels scaled to [0, 1]. An
    image smaller than the crop after resizing is padded with black, as torchvision does. ``interpolation`` is
    ``"bilinear"`` or ``"bicubic"``, both antialiased. If an odd number of pixels lies outside the crop, the centred
    crop would start at half a pixel. The position is then rounded to the even neighbour (``crop_rounding="nearest"``,
    as torchvision and timm do) or down (``"down"``, as transformers does).

    Raises ``ImageError`` for sizes below 1, a ``std`` that is not positive, and any other interpolation or rounding.
    """

    resize: int
    crop: int
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    crop_rounding: Literal["nearest", "down"] = "nearest"

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ImageError(f"{name} is {value!r}; pass a whole number of pixels, at least 1.")
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3 or not np.isfinite(values).all() or (name == "std" and min(values) <= 0):
                limit = " above 0" if name == "std" else ""
                raise ImageError(f"{name} is {values}; pass three finite numbers{limit}, for pixels scaled to 0..1.")
            object.__setattr__(self, name, values)
        for name, accepted in (("interpolation", INTERPOLATIONS), ("crop_rounding", ("nearest", "down"))):
            if getattr(self, name) not in accepted:
                raise ImageError(f"{name} is {getattr(self, name)!r}; pass {' or '.join(map(repr, accepted))}.")

    def __call__(self, image: ImageSource) -> Tensor:
        """Return one image as float32 ``[3, crop, crop]``, normalised. The result for a tensor stays on its device.

        Raises ``ImageError`` for images that :func:`load_image` rejects.
        """
        pixels = self._cropped(image)
        scaled = pixels.to(torch.float32) / (255 if pixels.dtype == torch.uint8 else 1)
        return normalised(scaled, self.mean, self.std)

    def crop_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom of the part of an image that the crop keeps, in the image's own pixels.

        The box extends beyond the image if the resized image is smaller than the crop and gets padded.
        """
        new = resized_size(height, width, self.resize)
        top, left = (crop_start(length, self.crop, self.crop_rounding) for length in new)
        rows, columns = height / new[0], width / new[1]
        return left * columns, top * rows, (left + self.crop) * columns, (top + self.crop) * rows

    def pixels(self, image: ImageSource) -> Tensor:
        """Return one image as raw RGB, uint8 ``[3, crop, crop]``, contiguous. A model normalises such input itself.

        The result for a tensor stays on its device. Raises ``ImageError`` for images that :func:`load_image` rejects.
        """
        return self._raw(image).clone(memory_format=torch.contiguous_format)

    def batch(
        self, images: ImageSource | Iterable[ImageSource], progress: bool = False, first_index: int = 0
    ) -> Tensor:
        """Return raw RGB of all ``images`` (see :func:`batch_sources`), uint8 ``[N, 3, crop, crop]``, channels-last.

        Files are decoded by several threads. The result is on the device of the images if all are tensors on one
        device, on the CPU otherwise. ``progress`` shows a bar after one second.

        Raises ``ImageError``. If there are several images, the message says which one failed (``images[3]: …``),
        counted from ``first_index``, for callers that read a longer list in chunks.
        """
        sources = batch_sources(images)
        devices = {source.device if isinstance(source, Tensor) else torch.device("cpu") for source in sources}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        batch = torch.empty(len(sources), self.crop, self.crop, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        # An object passed twice is read once: two threads must not load the same lazy PIL image or open file.
        positions: dict[int, list[int]] = {}
        for index, source in enumerate(sources):
            positions.setdefault(id(source), []).append(index)
        results: Iterable[tuple[int, Tensor]] = self._each(sources, [i[0] for i in positions.values()], first_index)
        if progress:
            results = progress_bar(results, total=len(positions), desc="Reading images", unit="image", delay=1.0)
        for index, pixels in results:
            for position in positions[id(sources[index])]:
                batch[position] = pixels
        return batch

    def _each(self, sources: list[ImageSource], wanted: list[int], first: int) -> Iterator[tuple[int, Tensor]]:
        """Yield each wanted index with its raw pixels."""

        def read(index: int) -> Tensor:
            try:
                return self._raw(sources[index])
            except ImageError as error:
                if len(sources) == 1 and not first:
                    raise
                raise ImageError(f"images[{first + index}]: {error}") from error

        # Tensors are processed in the calling thread, because their CUDA stream is current only there.
        tensors = [index for index in wanted if isinstance(sources[index], Tensor)]
        others = [index for index in wanted if not isinstance(sources[index], Tensor)]
        yield from ((index, read(index)) for index in tensors)
        if len(others) == 1:
            yield others[0], read(others[0])
        elif others:
            with ThreadPoolExecutor(min(len(others), MAX_THREADS, os.cpu_count() or 1)) as pool:
                yield from zip(others, pool.map(read, others), strict=True)

    def _raw(self, image: ImageSource) -> Tensor:
        """Return uint8 ``[3, crop, crop]`` in any memory layout, possibly a view of ``image``."""
        return to_uint8(self._cropped(image))

    def _cropped(self, image: ImageSource) -> Tensor:
        """Return ``[3, crop, crop]``: floating point in 0..1 for a floating-point tensor, uint8 for everything else."""
        source = checked_tensor(image) if isinstance(image, Tensor) else load_image(image)
        size = source.shape[1:] if isinstance(source, Tensor) else (source.height, source.width)
        new = resized_size(size[0], size[1], self.resize)
        top, left = (crop_start(length, self.crop, self.crop_rounding) for length in new)
        if new[0] * new[1] > MAX_RESIZED_PIXELS:
            return _resized_window(source, new, top, left, self.crop, self.interpolation).expand(3, -1, -1)
        if isinstance(source, Tensor):
            return cropped(_resize(source, new, self.interpolation), top, left, self.crop).expand(3, -1, -1)
        resized = source.resize((new[1], new[0]), INTERPOLATIONS[self.interpolation])
        return _to_tensor(resized.crop((left, top, left + self.crop, top + self.crop)))  # black outside the image


def normalised(scaled: Tensor, mean: Triple, std: Triple) -> Tensor:
    """Return images ``[…, 3, H, W]``, float32 in 0..1, with ``mean`` subtracted and divided by ``std``."""
    means, stds = (
        torch.tensor(values, dtype=torch.float32, device=scaled.device).view(3, 1, 1) for values in (mean, std)
    )
    return (scaled - means) / stds


def batch_sources(images: ImageSource | Iterable[ImageSource]) -> list[ImageSource]:
    """Return a list of the single images in ``images``, without reading them.

    ``model.predict`` and :meth:`Transforms.batch` start with this function. A list, a tuple or an iterator
    (``folder.glob("*.jpg")``) is taken item by item, a batched array ``[N, H, W, C]`` or tensor ``[N, C, H, W]`` is
    split along N, and anything else is one image. Raises ``ImageError`` for items that are themselves lists or batches,
    and for other containers, such as a dict.
    """
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        return list(images)
    if is_one_image(images):
        return [images]  # type: ignore[list-item]
    if not isinstance(images, (list, tuple, Iterator)):
        raise ImageError(f"Images cannot be a {type(images).__name__}; pass {ACCEPTED}, or a list of these.")
    sources: list[ImageSource] = list(images)
    for index, source in enumerate(sources):
        if isinstance(source, (list, tuple)) or (isinstance(source, (np.ndarray, Tensor)) and source.ndim == 4):
            raise ImageError(f"images[{index}] is itself a list or a batch; pass one flat list of single images.")
    return sources


def is_one_image(images: object) -> bool:
    """Return True if ``images`` is one image, not a list, an iterator or a batch of them."""
    if isinstance(images, (np.ndarray, Tensor)):
        return images.ndim != 4
    single = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)
    return isinstance(images, single) or hasattr(images, "read")


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resized_size(height: int, width: int, short: int) -> tuple[int, int]:
    """Return height and width after resizing the shorter side to ``short``; the longer side is rounded down, as in
    torchvision.
    """
    if width <= height:
        return int(short * height / width), short
    return short, int(short * width / height)


def crop_start(size: int, crop: int, rounding: str = "nearest") -> int:
    """Return the first row or column of a centre crop, rounded as in torchvision or down; negative means padding."""
    if size < crop:
        return -((crop - size) // 2)
    return round((size - crop) / 2) if rounding == "nearest" else (size - crop) // 2


def _resize(tensor: Tensor, new: tuple[int, int], interpolation: str) -> Tensor:
    """Resize ``[C, H, W]``, uint8 (computed in float32) or floating point, with antialiasing."""
    if new == (tensor.shape[1], tensor.shape[2]):
        return tensor
    values = tensor.to(torch.float32) if tensor.dtype == torch.uint8 else tensor
    resized = F.interpolate(values[None], new, mode=interpolation, antialias=True)[0]
    return _whole(resized) if tensor.dtype == torch.uint8 else resized


def _whole(values: Tensor) -> Tensor:
    """Round grey levels to uint8 and clip them, because bicubic filters overshoot at edges."""
    return values.round().clamp(0, 255).to(torch.uint8)


def cropped(tensor: Tensor, top: int, left: int, crop: int) -> Tensor:
    """Return ``[C, crop, crop]`` from row ``top`` and column ``left`` of ``[C, H, W]``, zero outside the image."""
    height, width = tensor.shape[1:]
    part = tensor[:, max(top, 0) : top + crop, max(left, 0) : left + crop]
    padding = [max(-left, 0), max(left + crop - width, 0), max(-top, 0), max(top + crop - height, 0)]
    return F.pad(part, padding) if any(padding) else part


def _resized_window(
    source: Image.Image | Tensor, new: tuple[int, int], top: int, left: int, crop: int, interpolation: str
) -> Tensor:
    """Return the crop of the image resized to ``new``, within one grey level, without resizing the rest."""
    tensor = source if isinstance(source, Tensor) else _to_tensor(source)
    rows, columns = (
        _filter(size, length, range(max(start, 0), min(start + crop, length)), tensor.device, interpolation)
        for size, length, start in zip(tensor.shape[1:], new, (top, left), strict=True)
    )
    window = tensor[:, rows[0], columns[0]].to(torch.float32) @ columns[1].T
    if isinstance(source, Image.Image):  # Pillow clips the overshoot along rows before it resizes along columns
        window = window.clamp_(0, 255)
    window = rows[1] @ window
    window = _whole(window) if tensor.dtype == torch.uint8 else window
    return cropped(window, min(top, 0), min(left, 0), crop)


def _filter(size: int, new: int, outputs: range, device: torch.device, interpolation: str) -> tuple[slice, Tensor]:
    """Return the inputs that ``outputs`` depend on when ``size`` pixels are resized to ``new``, and their weights.

    The weights are float32: a triangle or Keys's cubic (a = −1/2) around each output's centre, normalised. When
    shrinking, the filter is widened by the scale (antialiasing).
    """
    scale = size / new
    unit = max(scale, 1.0)
    support = unit if interpolation == "bilinear" else 2 * unit
    centres = (torch.arange(outputs.start, outputs.stop, dtype=torch.float64, device="cpu") + 0.5) * scale
    first = max(int(float(centres[0]) - support), 0)
    last = min(int(float(centres[-1]) + support) + 1, size)
    inputs = torch.arange(first, last, dtype=torch.float64, device="cpu") + 0.5
    distance = (inputs[None] - centres[:, None]).abs() / unit  # [outputs, inputs]
    near, far = (1 - distance).clamp_(min=0), (2 - distance).clamp_(min=0)
    weights = near if interpolation == "bilinear" else near**2 * (2 * distance - 1) + far**2 * (1 - distance) / 2
    weights = weights / weights.sum(dim=1, keepdim=True)
    return slice(first, last), weights.to(device, torch.float32)
