"""Check numbers that users pass: any kind of whole number is accepted, also NumPy's, but no bool. Help of options."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from .errors import InputError

# The help of --model and --categories, which several commands have.
MODEL_HELP = "a name from 'fastres list', a saved model or folder, or a hub id (default: %(default)s)"
CATEGORIES_HELP = "file with the class names, one a line or in JSON (default: those of the weights)"


def is_whole(value: object) -> bool:
    """Return True for a whole number of any kind that Python takes as an index, except for bools."""
    kind = str(getattr(value, "dtype", ""))  # NumPy's and PyTorch's bools are indices, too
    return hasattr(value, "__index__") and not isinstance(value, bool) and not kind.endswith("bool")


def whole_number(value: Any, name: str, least: int = 1) -> int:
    """Return ``value`` as an int. Raise ``InputError``, which names it, unless it is whole and at least ``least``."""
    try:
        number = operator.index(value) if is_whole(value) else None
    except TypeError:  # an array or a tensor of several numbers, or of fractions
        number = None
    if number is None or number < least:
        raise InputError(f"{name} is {value!r}; give a whole number of at least {least}")
    return number


def image_sides(size: Any, name: str = "image_size") -> tuple[int, int]:
    """Return height and width, given as one number for both or as a pair. Raise ``InputError`` for anything else."""
    sides = (size, size) if is_whole(size) else tuple(size) if isinstance(size, Sequence) else ()
    try:
        height, width = (whole_number(side, name) for side in sides)
    except (InputError, ValueError):
        raise InputError(f"{name} is {size!r}; give a number of pixels, or a pair (height, width)") from None
    return height, width
