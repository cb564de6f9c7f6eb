"""Class names by index, from the package's data files."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Literal

from fastres.errors import InputError

_DIGITS = tuple("0123456789")


@functools.cache
def load(kind: Literal["imagenet", "digits"]) -> tuple[str, ...]:
    """Return the class names of ``kind``, in the order of the logits.

    ``"imagenet"`` has the 1000 names of torchvision's weights, ``"digits"`` has ``"0"`` to ``"9"``. The file is read
    only on the first call. Raises ``InputError`` for any other kind.
    """
    if kind == "digits":
        return _DIGITS
    if kind == "imagenet":
        text = resources.files("fastres").joinpath("data", "imagenet_categories.json").read_text(encoding="utf-8")
        return tuple(json.loads(text))
    raise InputError(f"There are no class names called {kind!r}; use 'imagenet' or 'digits'.")
