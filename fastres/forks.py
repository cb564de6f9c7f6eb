"""Make models usable in a forked process, whatever the parent's threads were doing.

``os.fork`` copies a lock in the state that it has. If another thread holds it at that moment, nobody in the child ever
releases it, and the first call there waits for ever. The threads of the parent do not exist in the child. So the child
gets new locks in the place of fastres's own (:class:`Guard`). oneDNN has a lock of its own, which cannot be renewed; so
a fork first waits until no other thread is inside a call (:data:`calls`).
"""

from __future__ import annotations

import os
import threading
import weakref

LONGEST_WAIT = 30.0  # seconds that a fork waits for calls of other threads


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


class Calls:
    """The calls in progress, as a context around each. They run side by side; a fork waits for those of other threads.

    A call that begins meanwhile waits for the fork.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._depths: dict[int, int] = {}  # of nested calls, by thread
        self._forks = 0

    def __enter__(self) -> None:
        thread = threading.get_ident()
        with self._changed:
            while self._forks and thread not in self._depths:
                self._changed.wait()
            self._depths[thread] = self._depths.get(thread, 0) + 1

    def __exit__(self, *error: object) -> None:
        thread = threading.get_ident()
        with self._changed:
            self._depths[thread] -= 1
            if not self._depths[thread]:
                del self._depths[thread]
            if self._forks:
                self._changed.notify_all()

    def before_fork(self) -> None:
        """Wait until no other thread is inside a call, but at most :data:`LONGEST_WAIT`."""
        thread = threading.get_ident()
        with self._changed:
            self._forks += 1
            self._changed.wait_for(lambda: self._depths.keys() <= {thread}, LONGEST_WAIT)

    def after_fork_in_parent(self) -> None:
        with self._changed:
            self._forks -= 1
            self._changed.notify_all()

    def after_fork_in_child(self) -> None:
        thread = threading.get_ident()
        self._changed = threading.Condition(threading.Lock())
        self._depths = {thread: self._depths[thread]} if thread in self._depths else {}
        self._forks = 0


_guards: weakref.WeakSet[Guard] = weakref.WeakSet()
calls = Calls()


def _renew_all() -> None:
    for guard in list(_guards):
        guard.renew()
    calls.after_fork_in_child()


os.register_at_fork(before=calls.before_fork, after_in_parent=calls.after_fork_in_parent, after_in_child=_renew_all)
