"""Run the main function of a program: its errors, its signals and its standard streams, the same for every program."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator

from . import interruption
from .errors import FastresError
from .memory import keep_memory_of_program
from .terminal import OutputStreamError, files_written, program_streams, say

BROKEN_PIPE = 128 + 13  # what shells report for a process that SIGPIPE ended


def run_program(
    main: Callable[[], int | None],
    name: str,
    *,
    owner: bool = True,
    starting: bool = False,
    wording: Callable[[str], str] = str,
) -> int:
    """Call ``main`` and return the exit status. ``name`` comes before messages, which ``wording`` may change.

    A ``FastresError`` is printed on standard error, and the status is 2. So it is if standard output does not take all
    of the text. If its reader has ended, as ``head`` does, the status is 141 and nothing is said. An interruption is
    one line, and the status is 128 and the number of the signal.

    ``owner`` means that the process ends afterwards. It then keeps its memory (:mod:`fastres.memory`). Otherwise
    signals stay with the caller. With ``starting``, a signal ends the process at once until ``main`` calls
    :func:`fastres.interruption.started`, because an exception in the middle of an import can get lost.
    """
    if owner:
        keep_memory_of_program()
    with interruption.orderly(name, starting) if owner else contextlib.nullcontext(lambda status: None) as end:
        try:
            status = _run(main, name, owner, wording)
        except KeyboardInterrupt as error:
            status = _interrupted(name, error)
        end(_number(status))
    if isinstance(status, SystemExit):
        raise status
    return status


def _number(status: int | SystemExit) -> int:
    """Return the exit status that Python makes of it."""
    code = status.code if isinstance(status, SystemExit) else status
    return code if isinstance(code, int) else int(code is not None)


def _run(main: Callable[[], int | None], name: str, owner: bool, wording: Callable[[str], str]) -> int | SystemExit:
    with program_streams(owner) as results, _short_warnings(name, wording):
        status: int | SystemExit = 0
        try:
            status = _status(main, name, wording)
            results.check()
        except OutputStreamError as error:
            if not error.broken_pipe:
                say(f"{name}: {error}")
            if isinstance(status, SystemExit) or not status:
                status = BROKEN_PIPE if error.broken_pipe else 2
        return status


def _status(main: Callable[[], int | None], name: str, wording: Callable[[str], str]) -> int | SystemExit:
    try:
        return int(main() or 0)
    except SystemExit as end:  # of argparse
        return end
    except FastresError as error:
        say(f"{name}: {wording(str(error))}")
        return 2
    except KeyboardInterrupt as error:
        return _interrupted(name, error)


@contextlib.contextmanager
def _short_warnings(name: str, wording: Callable[[str], str]) -> Iterator[None]:
    """Within the context, print fastres's warnings as messages, without a place in the code."""
    usual = warnings.formatwarning
    package = os.path.join(os.path.dirname(__file__), "")

    def short(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if category.__module__.startswith("fastres.") or filename.startswith(package):
            return f"{name}: warning: {wording(str(message))}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = short
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _interrupted(name: str, error: KeyboardInterrupt) -> int:
    complete = " and ".join(files_written())
    text, status = interruption.describe(error, f"{complete} is complete" if complete else "run the command again")
    say(f"{name}: {text}")
    return status
