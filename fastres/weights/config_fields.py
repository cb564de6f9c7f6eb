"""Check fields of other libraries' ``config.json``; errors name fields that are missing or have an unusable value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from fastres.errors import ConfigError, ImageError
from fastres.images.transforms import Transforms

T = TypeVar("T")

# Far more than any real network has: a damaged number must not make a loop run, or memory be filled, for hours.
MOST_CLASSES = 2_000_000
MOST_BLOCKS = 1_000  # in a stage
MOST_CHANNELS = 65_536
MOST_PIXELS = 65_536


def field(config: Mapping[str, Any], key: str, kind: type[T], source: str, default: T | None = None) -> T:
    """Return ``config[key]``, or ``default`` if it is absent or null.

    Raises ``ConfigError`` if the value has another type than ``kind`` or is not finite, or if there is neither value
    nor default.
    """
    value = config.get(key)
    if value is None:
        if default is None:
            raise ConfigError(f"{source}: config.json has no {key!r}. Save the model again, or add the field.")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return kind(value)  # type: ignore[call-arg]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(
            f"{source}: {key} is {shown(value)} in its configuration; it must be of type {kind.__name__}."
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{source}: {key} is {value} in its configuration; it must be a finite number.")
    return value


def fields(config: Mapping[str, Any], source: str, **defaults: Any) -> dict[str, Any]:
    """Return the value of each field in ``defaults``; a field has the type of its default. Raises as :func:`field`."""
    return {key: field(config, key, type(default), source, default) for key, default in defaults.items()}


def whole_numbers(values: Any, key: str, source: str, most: int) -> tuple[int, ...]:
    """Return ``values`` as a tuple; raises ``ConfigError`` unless they are whole numbers from 1 to ``most``."""
    fits = isinstance(values, (list, tuple)) and 0 < len(values) <= 100
    if not fits or any(isinstance(v, bool) or not isinstance(v, int) or not 1 <= v <= most for v in values):
        raise ConfigError(
            f"{source}: {key} is {shown(values)} in its configuration; it must be whole numbers, at least 1 and at "
            f"most {most:,}."
        )
    return tuple(values)


def made_transforms(source: str, **arguments: Any) -> Transforms:
    """Return ``Transforms(**arguments)``; raises ``ConfigError`` if a value cannot be used."""
    for name in ("mean", "std"):
        values = arguments[name]
        if len(values) != 3 or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
            raise ConfigError(f"{source}: {name} is {shown(values)} in its configuration; it must be three numbers.")
    try:
        return Transforms(**arguments)
    except (ImageError, OverflowError) as error:
        raise ConfigError(f"{source}: its configuration cannot be used: {error}") from error


def shown(value: object) -> str:
    """Return ``repr(value)``, shortened; it may be nested too deeply for ``repr``, or a number too long for it."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:79]}…"
