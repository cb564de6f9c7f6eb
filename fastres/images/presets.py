"""Translate the preprocessing that torchvision publishes with its weights to :class:`Transforms`."""

from __future__ import annotations

import functools
from typing import Any

from fastres.errors import InputError

from .transforms import INTERPOLATIONS, Transforms

ACCEPTED = "a fastres.Transforms, or the transforms of torchvision's classification weights: weights.transforms()"


def parse(value: Any) -> Transforms:
    """Return ``value`` if it is a :class:`Transforms`, or what does the same as torchvision's ``ImageClassification``.

    Raises ``InputError`` for anything else, and for presets that resize to a rectangle, do not antialias, or
    interpolate by another filter than the bilinear or bicubic one.
    """
    if isinstance(value, Transforms):
        return value
    if isinstance(value, functools.partial) and getattr(value.func, "__name__", "") == "ImageClassification":
        value = value()  # weights.transforms without the parentheses
    if type(value).__name__ != "ImageClassification":
        raise InputError(f"transforms is a {type(value).__name__}; give {ACCEPTED}")
    interpolation = str(getattr(value.interpolation, "value", value.interpolation))
    if interpolation not in INTERPOLATIONS:
        raise _unsupported(
            f"interpolates by {interpolation!r}, but fastres by {' or '.join(map(repr, INTERPOLATIONS))}"
        )
    if value.antialias is False:
        raise _unsupported("resizes tensors without antialiasing, but fastres always uses it")
    sizes = (_side(value.resize_size, "resize_size", 1), _side(value.crop_size, "crop_size", 2))
    return Transforms(*sizes, tuple(value.mean), tuple(value.std), interpolation)  # type: ignore[arg-type]


def _side(size: Any, name: str, longest: int) -> int:
    """Return the length of a side in pixels, given as a number or as up to ``longest`` equal numbers, also nested."""
    sides = size
    while isinstance(sides, (list, tuple)) and len(sides) == 1:
        sides = sides[0]
    sides = list(sides) if isinstance(sides, (list, tuple)) else [sides]
    if len(sides) > longest or len(set(sides)) != 1:
        raise _unsupported(f"has {name}={size!r}, but fastres resizes the shorter side and crops a square")
    return int(sides[0])


def _unsupported(what: str) -> InputError:
    return InputError(f"The transforms cannot be done by fastres: the preset {what}. Give {ACCEPTED}")
