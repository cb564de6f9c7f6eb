"""Locks that a forked process does not inherit locked.

``os.fork`` copies a lock in the state that it has. If another thread holds it at that moment, nobody in the child ever
releases it, and the first call there would wait for ever. The threads of the parent do not exist in the child, so a new
lock takes the place of each one.
"""

from __future__ import annotations

import os
import threading
import weakref


class Guard:
    """A lock for a ``with`` block. A forked child finds it open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _guards.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Take a new lock. Called in the child of a fork, which has only one thread."""
        self._lock = threading.Lock()


_guards: weakref.WeakSet[Guard] = weakref.WeakSet()


def _renew_all() -> None:
    for guard in list(_guards):
        guard.renew()


os.register_at_fork(after_in_child=_renew_all)
