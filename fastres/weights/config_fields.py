"""Fields of other libraries' ``config.json``, checked: what is missing, of another type or contradictory is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fastres.errors import ConfigError

T = TypeVar("T")


def field(config: Mapping[str, Any], key: str, kind: type[T], source: str, default: T | None = None) -> T:
    """``config[key]``, or ``default`` where it is absent or null; raises ``ConfigError`` for another type or none."""
    value = config.get(key)
    if value is None:
        if default is None:
            raise ConfigError(f"{source}: config.json does not say {key!r}.")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return kind(value)  # type: ignore[call-arg]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{source}: {key} is {value!r} in its configuration, where {kind.__name__} is expected.")
    return value


def whole_numbers(values: Any, key: str, source: str) -> tuple[int, ...]:
    """``values`` as a tuple of whole numbers of at least 1."""
    fits = isinstance(values, (list, tuple)) and len(values) > 0
    if not fits or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise ConfigError(f"{source}: {key} is {values!r} in its configuration; a list of whole numbers is expected.")
    return tuple(values)
