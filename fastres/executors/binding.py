"""Bind oneDNN's primitives to memory, and join their runs to routines, which one thread at a time may call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

from fastres.onednn.library import Library
from fastres.onednn.loop import Execution, loop_over
from fastres.onednn.objects import Operation, Owned, aligned, bound, memory, new_stream

Call = Execution | Callable[[], None]
Routine = Callable[[], None]


class Binder:
    """Binds operations to memory. ``scratchpad`` is an address; ``kept`` must live as long as the routines.

    Without ``machine_code``, Python runs the primitives one by one.
    """

    def __init__(self, library: Library, scratchpad: int, machine_code: bool = True) -> None:
        self.library, self.kept, self._machine_code = library, list[object](), machine_code
        self._stream, self._scratchpad = new_stream(library), scratchpad

    def memories(self, operation: Operation, source: int = 0, destination: int = 0) -> tuple[Owned, Owned]:
        """Return the source and destination of ``operation`` at these addresses; 0 is for one that is set later."""
        return memory(self.library, operation.source, source), memory(self.library, operation.destination, destination)

    def bound(
        self, operation: Operation, source: Owned, destination: Owned, *, own_scratchpad: bool = False
    ) -> Execution:
        """Return the run of ``operation`` from ``source`` to ``destination``.

        An operation that was not known when the scratchpad was made needs its own.
        """
        scratchpad = self._scratchpad
        if own_scratchpad:
            own = aligned(operation.scratchpad_bytes)
            self.kept.append(own)
            scratchpad = own.data_ptr()
        return bound(self.library, operation, self._stream, source, destination, scratchpad, self.kept)

    def routine(self, calls: Iterable[Call]) -> Routine:
        """Return a function that makes ``calls`` one after another: primitives that follow each other in one loop.

        It raises ``OneDnnError`` or ``MemoryError`` at the first primitive that fails.
        """
        runs: list[Callable[[], int | None]] = []
        for primitives, some in groupby(calls, lambda call: isinstance(call, Execution)):
            if primitives:
                executions = [call for call in some if isinstance(call, Execution)]
                runs.append(loop_over(self.library, executions, self._machine_code))
            else:
                runs += [call for call in some if not isinstance(call, Execution)]
        check = self.library.check_execution

        def run_all() -> None:
            for run in runs:
                status = run()
                if status:
                    check(status)

        return run_all
