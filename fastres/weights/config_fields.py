"""Check fields of other libraries' ``config.json``; errors name fields that are missing or have the wrong type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fastres.errors import ConfigError

T = TypeVar("T")


def field(config: Mapping[str, Any], key: str, kind: type[T], source: str, default: T | None = None) -> T:
    """Return ``config[key]``, or ``default`` if it is absent or null.

    Raises ``ConfigError`` if the value has another type than ``kind``, or if there is neither value nor default.
    """
    value = config.get(key)
    if value is None:
        if default is None:
            raise ConfigError(f"{source}: config.json has no {key!r}. Save the model again, or add the field.")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return kind(value)  # type: ignore[call-arg]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{source}: {key} is {value!r} in its configuration; it must be of type {kind.__name__}.")
    return value


def fields(config: Mapping[str, Any], source: str, **defaults: Any) -> dict[str, Any]:
    """Return the value of each field in ``defaults``; a field has the type of its default. Raises as :func:`field`."""
    return {key: field(config, key, type(default), source, default) for key, default in defaults.items()}


def whole_numbers(values: Any, key: str, source: str) -> tuple[int, ...]:
    """Return ``values`` as a tuple; raises ``ConfigError`` unless they are whole numbers of at least 1."""
    fits = isinstance(values, (list, tuple)) and len(values) > 0
    if not fits or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise ConfigError(f"{source}: {key} is {values!r} in its configuration; it must be whole numbers, at least 1.")
    return tuple(values)
