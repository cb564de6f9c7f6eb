"""Stop a program in an orderly way on Ctrl-C, SIGTERM and SIGHUP, without a traceback.

The first signal raises :class:`Interruption` in the main thread, so that temporary files are deleted and finished rows
are kept. A second Ctrl-C or SIGTERM ends the process at once, even if the main thread is inside a long call. Only
programs use this (:func:`fastres.program.run_program`). In a library call, Python's own handling stays as it is.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# Wrappers such as timeout(1) send a signal to the process and to its group. Both arrive within this many seconds.
_ONE_EVENT = 0.2
BEFORE = "the work had not begun, run the command again"
_current: Signals | None = None
_AGAIN = 128  # added to the number of a signal, in the pipe to the thread, to have it sent once more


class Interruption(KeyboardInterrupt):
    """Ctrl-C, or a signal that asks the program to end. ``args[0]``, if there is one, says what was kept."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


def describe(error: KeyboardInterrupt, advice: str) -> tuple[str, int]:
    """Return one sentence about an interruption, and the exit status. ``advice`` is used if ``error`` has no text."""
    number = getattr(error, "signal", signal.SIGINT)
    text = str(error) or f"interrupted; {advice}"
    if number != signal.SIGINT:
        text = text.replace("interrupted", f"interrupted by {number.name}", 1)
    return text, 128 + number


class Signals:
    """The signals to a program. ``starting`` means that there is nothing to clean up, so the first one ends it."""

    def __init__(self, program: str, starting: bool) -> None:
        self.program = program
        self.starting = starting
        self._first: float | None = None  # the time of the first signal
        self._raised = False
        self._process = os.getpid()
        self._forking = threading.local()
        self._reading, self._writing = os.pipe()
        for end in (self._reading, self._writing):
            os.set_blocking(end, end == self._reading)

    def handle(self, number: int, frame: object) -> None:
        """Raise ``Interruption``, once; the thread takes care of later signals."""
        if self.starting:
            _say(f"{self.program}: {describe(Interruption(number), BEFORE)[0]}\n")
            os._exit(128 + number)
        if not self._raised:
            self._raised = True
            raise Interruption(number)

    def watch(self) -> None:
        """Read the signals that arrive, in a thread, and end the process at the second Ctrl-C or SIGTERM."""
        while number := int.from_bytes(os.read(self._reading, 1), "little"):
            now = time.monotonic()
            if number > _AGAIN:
                time.sleep(0.02)  # until the main thread has left the place where exceptions are ignored
                signal.pthread_kill(threading.main_thread().ident or 0, number - _AGAIN)
            elif number not in self._before:  # such as SIGCHLD, for which torch has a handler
                continue
            elif self._first is None:
                self._first = now
            elif now - self._first > _ONE_EVENT and number in (signal.SIGINT, signal.SIGTERM):
                _say(f"{self.program}: interrupted again; the program ended at once\n")
                os._exit(128 + number)

    def unraisable(self, ignored: Any) -> None:
        """Replace ``sys.unraisablehook``: send the signal again if its exception was raised where Python ignores it."""
        if isinstance(ignored.exc_value, Interruption):
            self._raised, self._first = False, None
            os.write(self._writing, bytes([_AGAIN + ignored.exc_value.signal]))
        else:
            self._usual_hook(ignored)

    def install(self) -> None:
        """Handle each signal that has Python's default, so that ``nohup`` and background jobs keep ignoring theirs."""
        if signal.getsignal(signal.SIGINT) == _end_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._before = {
            number: usual
            for number, usual in (
                (signal.SIGINT, signal.default_int_handler),
                (signal.SIGTERM, signal.SIG_DFL),
                (signal.SIGHUP, signal.SIG_DFL),
            )
            if signal.getsignal(number) == usual
        }
        self._usual_hook, sys.unraisablehook = sys.unraisablehook, self.unraisable
        self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self.watch, name="signals", daemon=True).start()
        for number in self._before:
            signal.signal(number, self.handle)
        os.register_at_fork(before=self._hold, after_in_parent=self._release, after_in_child=self._leave_to_child)

    def end(self, status: int) -> None:
        """Note that the work is done. While the interpreter ends, a signal ends the process at once with ``status``."""
        if self._process != os.getpid():
            return
        for number in self._before:
            signal.signal(number, lambda *_: os._exit(status))
        signal.set_wakeup_fd(self._wakeup)
        sys.unraisablehook = self._usual_hook
        os.close(self._writing)  # ends the thread
        self._process = 0

    def _hold(self) -> None:
        """Before a fork, let signals wait: one to the child must not find this program's handlers there."""
        if self._process:
            self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._before)

    def _release(self) -> None:
        if self._process:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)

    def _leave_to_child(self) -> None:
        """Give a forked child the handlers that it would have without this program's."""
        if self._process:
            for number, usual in self._before.items():
                if signal.getsignal(number) == self.handle:
                    signal.signal(number, usual)
            signal.set_wakeup_fd(self._wakeup)
            sys.unraisablehook = self._usual_hook
            self._release()
            self._process = 0


@contextlib.contextmanager
def orderly(program: str, starting: bool) -> Iterator[Callable[[int], None]]:
    """Handle signals within the context. Outside the main thread nothing can be handled.

    Yields a function to call with the exit status when the work is done.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield lambda status: None
        return
    _current = signals = Signals(program, starting)
    signals.install()
    try:
        yield signals.end
    finally:
        signals.end(1)
        _current = None


def started() -> None:
    """Note that all is imported: from now on, a signal raises ``Interruption`` in the main thread."""
    if _current is not None:
        _current.starting = False


def start_program() -> None:
    """If ``python -m`` is starting a module of fastres, end with one line at Ctrl-C, also in the middle of an import.

    An exception would be a traceback, and inside torch's own code it would abort the process.
    """
    if getattr(sys, "argv", None) and sys.argv[0] == "-m":
        name = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
        known = name.partition(".")[0] in ("fastres", "bench", "export")
        usual = signal.getsignal(signal.SIGINT) == signal.default_int_handler
        if known and usual and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, _end_at_once)


def _end_at_once(number: int, frame: object) -> None:
    """Say that the program was interrupted, and let the signal end it; shells report 130."""
    _say(f"fastres: {describe(Interruption(number), 'run the command again')[0]}\n")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _say(text: str) -> None:
    """Write to standard error if that is possible at once."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, text.encode())
