"""Numbers, lists and names of classes as the report writes them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

ABSENT = "–"


def finite(value: Any) -> float | None:
    """Return a number as a float, and ``None`` for what is absent or not finite."""
    return float(value) if value is not None and math.isfinite(value) else None


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share from 0 to 1 in percent. Only 0 is ``0%`` and only 1 is ``100%``."""
    if (share := finite(value)) is None:
        return ABSENT
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    least = 10.0 ** -(digits + 2)
    if 0 < share < least / 2:
        return f"<{least:.{digits}%}"
    if 1 - least / 2 <= share < 1:
        return f">{1 - least:.{digits}%}"
    return f"{share:.{digits}%}"


def digits_for(images: int) -> int:
    """Return the digits after the point that a share of so many ``images`` deserves in percent."""
    return 0 if images <= 100 else 1 if images < 10_000 else 2


def points(difference: float) -> str:
    """Return a difference of two shares as percentage points."""
    return f"{100 * difference:.2g}" if abs(difference) < 0.01 else f"{100 * difference:.1f}"


def between(low: float | None, high: float | None, digits: int = 1) -> str:
    """Return an interval of shares: ``89.1–91.0%``."""
    if finite(low) is None or finite(high) is None:
        return ""
    return f"{percent(low, digits).removesuffix('%')}–{percent(high, digits)}"


def significant(value: float | None, digits: int = 3) -> str:
    """Return a number with at least ``digits`` significant digits, with commas and without an exponent."""
    if (number := finite(value)) is None:
        return ABSENT
    if number == 0:
        return "0"
    places = digits - 1 - int(f"{number:.{digits - 1}e}".partition("e")[2])
    return f"{number:,.{min(max(places, 0), 9)}f}"


def error(value: float | None) -> str:
    """Return a relative error in percent with two significant digits, and a tiny one with an exponent."""
    if value is not None and not math.isfinite(value):
        return "not finite"
    if (number := finite(value)) is None:
        return ABSENT
    return f"{significant(100 * number, 2)}%" if number == 0 or number >= 1e-4 else f"{number:.1e}"


def count(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: ``1 image``, ``3,600 images``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return names as a list in a sentence; of many, the first and the number of the others."""
    if len(names) > most + 1:
        return f"{', '.join(names[:most])} and {len(names) - most:,} others"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def shortened(text: str, most: int) -> str:
    """Return ``text`` with at most ``most`` characters: its beginning and its end, with … between them."""
    if len(text) <= most:
        return text
    end = (most - 1) // 3
    return f"{text[: most - 1 - end].rstrip()}…{text[len(text) - end :].lstrip()}"


class ClassNames:
    """The names of classes by index. A name that several classes have is followed by the index."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._repeated = {name for name, times in Counter(names).items() if times > 1}

    def __call__(self, index: int | None) -> str:
        if index is None:
            return ABSENT
        name = self._names[index] if 0 <= index < len(self._names) else ""
        if not name.strip():
            return f"class {index}"
        return f"{name} ({index})" if name in self._repeated else name
