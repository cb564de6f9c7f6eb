"""Run ``fastres classify`` as a program of its own, and watch it: its progress bar over time, and its memory.

A :class:`Program` has a pseudoterminal as its standard error. There the progress bar is written several times a
second, and each number of rows gets the time at which it was read.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import resource
import select
import shlex
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import fastres
from fastres.errors import FastresError

TICK_S = 0.05  # the longest time between two looks at a program
GRACE_S = 5.0  # in which an interrupted program may end its own processes
_BAR = re.compile(rb"classify[^\r\n|]*\|[^\r\n|]*\| *(\d+)/(\d+) \[")
_KEPT = 4096  # bytes of the screen


class Sample(NamedTuple):
    """The memory of a program and all its processes, in 10⁶ bytes (:func:`memory_mb`), after ``rows`` rows."""

    s: float
    rows: int
    resident_mb: float
    own_mb: float


class Bar:
    """What the progress bar of ``fastres classify`` has shown: ``points`` are pairs of seconds and rows."""

    def __init__(self) -> None:
        self.points: list[tuple[float, int]] = []
        self.total = 0
        self._text = b""

    @property
    def rows(self) -> int:
        return self.points[-1][1] if self.points else 0

    def feed(self, text: bytes, now: float) -> None:
        """Take what was written to the screen at ``now``."""
        self._text += text
        end = 0
        for match in _BAR.finditer(self._text):
            rows, self.total, end = int(match[1]), int(match[2]), match.end()
            if not self.points or rows > self.rows:
                self.points.append((now, rows))
        self._text = self._text[end:][-_KEPT:]

    def steady_rate(self, edge: float = 0.1) -> float | None:
        """Return rows per second without the first and the last ``edge`` of the rows, or ``None`` if they were too few.

        Both ends are moments at which the bar was written, so that no rate is interpolated.
        """
        inside = [(at, rows) for at, rows in self.points if edge * self.total <= rows <= (1 - edge) * self.total]
        if len(inside) < 2 or inside[-1][0] == inside[0][0]:
            return None
        return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])


def level(samples: Iterable[Sample], kind: str, total: int, share: float, around: float = 0.05) -> float | None:
    """Return the median of the field ``kind`` while about ``share`` of the rows were finished; ``None`` if unknown.

    The time after the last row does not count: the program's processes end then.
    """
    found = [getattr(each, kind) for each in samples if each.rows < total and abs(each.rows / total - share) <= around]
    return statistics.median(found) if found else None


class Program:
    """A running ``fastres classify`` with these ``arguments``, on these ``cores``. Call :meth:`close`.

    ``arguments`` must have ``--json``. At its end there are its ``report`` and the wall time in ``seconds``.
    """

    def __init__(self, arguments: Sequence[str], cores: Iterable[int], variables: Mapping[str, str]) -> None:
        self.arguments = ["fastres", "classify", *arguments]
        self.bar, self.samples = Bar(), list[Sample]()
        self.seconds, self.report = 0.0, dict[str, Any]()
        self._output, self._last = tempfile.TemporaryFile(), b""  # noqa: SIM115
        self.screen, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
        root = str(Path(fastres.__file__).parents[1])  # the program's fastres is the one of this process
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        try:
            with on_cores(cores):
                self._began = time.perf_counter()
                self.process = subprocess.Popen(
                    [sys.executable, "-m", *self.arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=self._output,
                    stderr=theirs,
                    env={**os.environ, "PYTHONPATH": paths, **variables},
                    start_new_session=True,  # Ctrl-C reaches only this program, which ends the other one
                )
        finally:
            os.close(theirs)

    @property
    def is_running(self) -> bool:
        return not self.seconds

    def look(self) -> None:
        """Read the screen, and note whether the program has ended. Raises ``FastresError`` if it has failed."""
        status = self.process.poll()
        now = time.perf_counter() - self._began
        while select.select([self.screen], [], [], 0)[0]:
            try:
                text = os.read(self.screen, 1 << 16)
            except OSError:  # nobody has it open any more
                break
            self._last = (self._last + text)[-_KEPT:]
            self.bar.feed(text, now)
        if status is not None:
            self.seconds = now
            if status:
                lines = [line for line in re.split(r"[\r\n]+", self._last.decode(errors="replace")) if line.strip()]
                raise FastresError(
                    f"{shlex.join(self.arguments)} ended with status {status}: {lines[-1] if lines else 'no message'}"
                )
            self._output.seek(0)
            self.report = json.loads(self._output.read())

    def sample(self) -> None:
        """Add its memory of this moment to ``samples``."""
        used = zip(*map(memory_mb, tree(self.process.pid)), strict=True)
        at = round(time.perf_counter() - self._began, 2)
        self.samples.append(Sample(at, self.bar.rows, *(round(sum(values), 1) for values in used)))

    def close(self) -> None:
        """End the program if it is running: it may end its own processes, and then all that are left are killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_S)
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.screen)
        self._output.close()


def watch(programs: Sequence[Program], tell: Callable[[int], object], memory_every_s: float | None = None) -> None:
    """Watch ``programs`` until all have ended. ``tell`` gets the number of rows that were added."""
    told, due = 0, 0.0
    while running := [program for program in programs if program.is_running]:
        time.sleep(TICK_S)
        for program in running:
            program.look()
        rows = sum(program.bar.rows for program in programs)
        tell(rows - told)
        told = rows
        if memory_every_s is not None and time.perf_counter() >= due:
            due = time.perf_counter() + memory_every_s
            for program in running:
                if program.is_running:
                    program.sample()


@contextmanager
def on_cores(cores: Iterable[int]) -> Iterator[None]:
    """Let this thread, and programs that it starts, use only these ``cores`` within the context."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def ended_s() -> float:
    """Return the time of the processor that ended programs and their processes have used, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# -- memory --------------------------------------------------------------------------------------------------


def tree(process: int) -> list[int]:
    """Return a process and all that it has started, directly or not."""
    found = [process]
    for each in found:  # grows meanwhile
        found += children(each)
    return found


def children(process: int) -> list[int]:
    """Return the processes that a process has started; none if it has ended."""
    found: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found += map(int, path.read_text().split())
    return found


def used_mb(process: int) -> float:
    """Return the resident memory of a process in 10⁶ bytes, or 0 if it has ended (:func:`memory_mb`)."""
    return round(memory_mb(process)[0], 1)


def memory_mb(process: int) -> tuple[float, float]:
    """Return the resident memory of a process, and that without files, in 10⁶ bytes; zeros if it has ended.

    These are proportional set sizes, which divide shared pages among processes, or resident set sizes if the kernel
    does not report the former. The pages of libraries are also divided among other programs that use them, so only the
    memory without files is independent of other programs.
    """
    for name, fields in (
        ("smaps_rollup", ("Pss", "Pss_Anon", "Pss_Shmem")),
        ("status", ("VmRSS", "RssAnon", "RssShmem")),
    ):
        try:
            lines = Path(f"/proc/{process}/{name}").read_text().splitlines()
        except OSError:
            continue
        parted = (line.partition(":") for line in lines)
        found = {field: int(rest.split()[0]) * 1024 / 1e6 for field, _, rest in parted if field in fields}
        if len(found) == len(fields):
            resident, *own = (found[field] for field in fields)
            return resident, sum(own)
    return 0.0, 0.0
