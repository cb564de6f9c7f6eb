"""A dictionary that keeps what was used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(OrderedDict[Key, Value]):
    """The ``kept`` values used last, from the one unused for longest. Threads that share it hold their owner's lock."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept = kept

    def keep(self, key: Key, value: Value) -> Value:
        """Make ``key`` the one used last and forget the one unused for longest, if there are too many; ``value``."""
        self[key] = value
        self.move_to_end(key)
        if len(self) > self.kept:
            self.popitem(last=False)
        return value

    def get_or_make(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of ``key``, which becomes the one used last; ``make()`` where it is not kept, None being a value.

        Nothing is forgotten before ``make`` returns: it may reuse parts of what is kept.
        """
        return self.keep(key, self[key] if key in self else make())
