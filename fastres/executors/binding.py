"""Bind oneDNN's primitives to memory: functions that take no arguments, and run in one thread at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fastres.onednn.library import Library
from fastres.onednn.objects import Operation, Owned, aligned, bound, memory, new_stream

# A function without arguments that may return a status of oneDNN's: anything but None and 0 is a failure.
Call = Callable[[], int | None]


class Binder:
    """Binds operations to memory. ``scratchpad`` is an address; ``kept`` must live as long as the functions."""

    def __init__(self, library: Library, scratchpad: int) -> None:
        self.library, self.kept = library, list[object]()
        self._stream, self._scratchpad = new_stream(library), scratchpad

    def memories(self, operation: Operation, source: int = 0, destination: int = 0) -> tuple[Owned, Owned]:
        """Return the source and destination of ``operation`` at these addresses; 0 is for one that is set later."""
        return memory(self.library, operation.source, source), memory(self.library, operation.destination, destination)

    def bound(self, operation: Operation, source: Owned, destination: Owned, *, own_scratchpad: bool = False) -> Call:
        """Return a function that runs ``operation`` from ``source`` to ``destination``, to be run by :func:`run_all`.

        An operation that was not known when the scratchpad was made needs its own.
        """
        scratchpad = self._scratchpad
        if own_scratchpad:
            own = aligned(operation.scratchpad_bytes)
            self.kept.append(own)
            scratchpad = own.data_ptr()
        return bound(self.library, operation, self._stream, source, destination, scratchpad, self.kept)


def run_all(library: Library, calls: Iterable[Call]) -> None:
    """Run ``calls`` one after another. Raises ``OneDnnError`` or ``MemoryError`` at the first that fails."""
    for call in calls:
        status = call()
        if status:
            library.check_execution(status)
