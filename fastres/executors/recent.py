"""A dictionary that keeps the most recently used values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(OrderedDict[Key, Value]):
    """Holds the ``kept`` most recently used values, oldest first. Threads that share it must hold the owner's lock."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept = kept

    def keep(self, key: Key, value: Value) -> Value:
        """Store ``value`` as the most recent, drop the least recently used if there are too many, return ``value``."""
        self[key] = value
        self.move_to_end(key)
        if len(self) > self.kept:
            self.popitem(last=False)
        return value

    def get_or_make(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of ``key``, or the result of ``make()`` if ``key`` is missing; it becomes the most recent.

        A stored None counts as a value. Nothing is dropped before ``make`` returns, so ``make`` may reuse kept values.
        """
        return self.keep(key, self[key] if key in self else make())
