"""Translate preprocessing that was made for other libraries to :class:`Transforms`, and change parts of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fastres.arguments import image_sides
from fastres.errors import ImageError, InputError

from .transforms import INTERPOLATIONS, Transforms

ACCEPTED = (
    "a fastres.Transforms, the transforms of torchvision's classification weights (weights.transforms()), a Compose of "
    "Resize, CenterCrop, ToTensor and Normalize, as timm.data.create_transform makes them, or an image processor of "
    "transformers"
)
# The steps of a Compose that turn pixels into numbers from 0 to 1: torchvision's, those of its v2, and timm's.
_TO_TENSOR = ("ToTensor", "MaybeToTensor", "PILToTensor", "MaybePILToTensor", "ToImage", "ConvertImageDtype", "ToDtype")


def parse(value: Any) -> Transforms:
    """Return ``value`` if it is a :class:`Transforms`, or what does the same as torchvision's or timm's transforms.

    These are ``ImageClassification``, the preset of torchvision's weights, and a ``Compose`` of ``Resize`` (of the
    shorter side), ``CenterCrop``, steps that make a tensor, and ``Normalize``. Raises ``InputError`` for anything else,
    and for transforms that resize to a rectangle, do not antialias, or interpolate by another filter than the bilinear
    or bicubic one.
    """
    if isinstance(value, Transforms):
        return value
    if isinstance(value, functools.partial) and getattr(value.func, "__name__", "") == "ImageClassification":
        value = value()  # weights.transforms without the parentheses
    if isinstance(getattr(value, "url", None), str) and hasattr(value, "transforms"):
        value = value.transforms()  # the weights themselves
    if type(value).__name__ == "ImageClassification":
        sizes = (_side(value.resize_size, "resize_size", 1), _side(value.crop_size, "crop_size", 2))
        return _transforms(*sizes, value, value)
    if type(value).__name__ == "Compose" and isinstance(getattr(value, "transforms", None), (list, tuple)):
        return _composed(list(value.transforms))
    raise InputError(f"transforms is a {type(value).__name__}; give {ACCEPTED}")


@dataclass(frozen=True)
class Change:
    """What is given of a model's preprocessing: all of it, or parts of it, which change that of the weights."""

    transforms: Transforms | None
    parts: Mapping[str, Any]

    @classmethod
    def of(cls, transforms: Any, image_size: Any, mean: Any, std: Any) -> Change:
        """Check the arguments of ``fastres.load`` and ``fastres.from_module``; raises ``InputError``."""
        whole = None if transforms is None else parse(transforms)
        change = cls(whole, {"image_size": image_size, "mean": mean, "std": std})
        change(whole or Transforms(1, 1))
        return change

    def __call__(self, transforms: Transforms) -> Transforms:
        """Return the preprocessing of weights with ``transforms``."""
        return adjusted(self.transforms or transforms, **self.parts)


def adjusted(base: Transforms, image_size: Any = None, mean: Any = None, std: Any = None) -> Transforms:
    """Return ``base`` with what is given of the size of the crop, in pixels, and of the normalisation.

    The shorter side is resized to keep its ratio to the crop, rounded down, as timm does: ``image_size=288`` for a
    resize to 256 and a crop of 224 is a resize to 329. Raises ``InputError`` for values that no transforms can have.
    """
    changes: dict[str, Any] = {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
    if image_size is not None:
        crop, width = image_sides(image_size)
        if crop != width:
            raise InputError(f"image_size is {image_size!r}, but fastres crops a square; give one number of pixels")
        changes |= {"crop": crop, "resize": math.floor(crop * base.resize / base.crop)}
    for name in ("mean", "std"):
        if name in changes:
            changes[name] = _triple(changes[name], name)
    try:
        return replace(base, **changes)
    except ImageError as error:
        raise InputError(str(error)) from error


def _triple(value: Any, name: str) -> tuple[float, ...]:
    """Return numbers of any kind as floats: of float32 the shortest decimals that stand for them."""
    try:
        array = np.asarray(value)
        return tuple(float(str(number)) for number in array.reshape(-1))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {value!r:.80}; give three numbers, for pixels scaled to 0..1") from error


def _composed(steps: list[Any]) -> Transforms:
    """Return the transforms that do what the steps of a ``Compose`` do, one after the other."""
    names = [type(step).__name__ for step in steps]
    if names[:1] in (["ToImage"], ["PILToTensor"], ["ToTensor"]):
        raise _unsupported(f"begin with {names[0]} and resize tensors, but fastres resizes files with Pillow")
    resize, steps = (steps[0], steps[1:]) if names[:1] == ["Resize"] else (None, steps)
    if resize is not None:
        _side(resize.size, "Resize", 1)
        if getattr(resize, "max_size", None) is not None:
            raise _unsupported(f"limit the longer side (max_size={resize.max_size}), but fastres does not")
    crop, steps = (steps[0], steps[1:]) if names[1:2] == ["CenterCrop"] else (None, steps)
    normalise, steps = (steps[-1], steps[:-1]) if names[-1:] == ["Normalize"] else (None, steps)
    kinds = [type(step).__name__ for step in steps]
    if resize is None or crop is None or not kinds or not set(kinds) <= set(_TO_TENSOR):
        raise _unsupported(
            f"are a Compose of {', '.join(names) or 'nothing'}, but fastres does Resize, CenterCrop, ToTensor and "
            "Normalize"
        )
    if not any(_scales(step) for step in steps):
        raise _unsupported(f"keep pixels in 0..255 ({', '.join(kinds)}), but fastres scales them to float32 in 0..1")
    colours = normalise or SimpleNamespace(mean=(0, 0, 0), std=(1, 1, 1))
    return _transforms(_side(resize.size, "Resize", 1), _side(crop.size, "CenterCrop", 2), resize, colours)


def _scales(step: Any) -> bool:
    """Return True if a step that makes a tensor turns pixels of 0..255 into float32 in 0..1."""
    if type(step).__name__ in ("ToTensor", "MaybeToTensor"):
        return True
    scales = type(step).__name__ == "ConvertImageDtype" or bool(getattr(step, "scale", False))
    return scales and getattr(step, "dtype", None) is torch.float32


def _transforms(resize: int, crop: int, resizing: Any, normalising: Any) -> Transforms:
    """Return transforms with these sizes in pixels, the filter of ``resizing``, and mean and std of ``normalising``."""
    interpolation = str(getattr(resizing.interpolation, "value", resizing.interpolation))
    if interpolation not in INTERPOLATIONS:
        accepted = " or ".join(map(repr, INTERPOLATIONS))
        raise _unsupported(f"interpolate by {interpolation!r}, but fastres by {accepted}")
    if resizing.antialias is False:
        raise _unsupported("resize tensors without antialiasing, but fastres always uses it")
    mean, std = _triple(normalising.mean, "mean"), _triple(normalising.std, "std")
    return Transforms(resize, crop, mean, std, interpolation)  # type: ignore[arg-type]


def _side(size: Any, name: str, longest: int) -> int:
    """Return the length of a side in pixels, given as a number or as up to ``longest`` equal numbers, also nested."""
    sides = size
    while isinstance(sides, (list, tuple)) and len(sides) == 1:
        sides = sides[0]
    sides = list(sides) if isinstance(sides, (list, tuple)) else [sides]
    if len(sides) > longest and len(set(sides)) == 1:
        raise _unsupported(
            f"squeeze images to a square ({name} {size!r}), but fastres keeps their proportions and crops the square, "
            f"as Resize({sides[0]}) and CenterCrop({sides[0]}) do"
        )
    if len(sides) > longest or len(set(sides)) != 1:
        raise _unsupported(f"have {name}={size!r}, but fastres resizes the shorter side and crops a square")
    return int(sides[0])


def _unsupported(what: str) -> InputError:
    return InputError(f"fastres cannot do these transforms: they {what}. Give {ACCEPTED}")
