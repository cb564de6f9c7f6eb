"""Run pieces in parallel, each in its own process, and stop each at its time limit."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from .pieces import Piece

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"  # has a folder for each card, written by ``make gpu-home``
PASSED, FAILED, LATE, ABSENT, UNFINISHED = "passed", "failed", "out of time", "absent", "unfinished"
GOES_ON = 75  # exit status (EX_TEMPFAIL) of a command that stopped in time and has more to do
NOT_TRIED = 69  # exit status (EX_UNAVAILABLE) of a command that had nothing to do on this GPU; its last line says why
ENDS = {0: PASSED, GOES_ON: UNFINISHED, NOT_TRIED: ABSENT}  # all others are failures
FINAL = (PASSED, ABSENT)  # pieces that ended so are not run again while their inputs are unchanged
LEAST_SECONDS = 8  # no piece is started with less time left
ERROR_LINES = 3


@dataclass(frozen=True)
class Outcome:
    """How and when a piece ended, with a digest of its inputs and the commit.

    ``error`` has the first lines of the error. ``run`` is the folder of its rows, or empty if it wrote none.
    """

    status: str
    seconds: float
    note: str
    inputs: str
    commit: str
    date: str
    error: str = ""
    run: str = ""


class Process(Protocol):
    """A piece's process, which leads its own process group, like ``subprocess.Popen``."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...


Start = Callable[[Sequence[str], Mapping[str, str], Path], Any]  # returns a Process


def start(command: Sequence[str], variables: Mapping[str, str], log: Path) -> Process:
    """Start a command in the project's root. Its output goes to ``log``."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


@dataclass
class _Running:
    piece: Piece
    process: Process
    log: Path
    begin: float
    run: Path
    again: Callable[[], Process]
    tries: int  # left
    end: float | None = None
    late: bool = False
    spoke: float | None = None  # when its first output came

    def is_late(self, now: float) -> bool:
        """Return True if its time is over. With grace, time starts at its first output, once torch and the GPU run."""
        with contextlib.suppress(OSError):  # there may be no log yet
            if self.spoke is None and self.log.stat().st_size:
                self.spoke = now
        if not self.piece.grace:
            return now - self.begin > self.piece.limit
        if self.spoke is None:
            return now - self.begin > self.piece.grace + self.piece.limit
        return now - self.spoke > self.piece.limit


def run_together(
    group: Sequence[Piece],
    folder: Path,
    left: Callable[[], float],
    variables: Mapping[str, str],
    commit: str,
    start: Start = start,
) -> dict[str, Outcome]:
    """Run pieces in parallel and return the outcome of each. Stop a piece at its limit, or when no time is ``left``.

    Logs go to ``logs`` in ``folder``. Each run has its own folder for rows in ``runs``, so that no run can damage the
    rows of another.
    """
    outcomes: dict[str, Outcome] = {}
    running: list[_Running] = []
    for name in ("logs", "runs", "smoke"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    try:
        for piece in group:
            if piece.needs and not shutil.which(piece.needs):
                outcomes[piece.name] = _outcome(piece, commit, ABSENT, 0.0, f"{piece.needs} is not installed")
                continue
            run = folder / "runs" / f"{_now():%Y%m%dT%H%M%S}-{label(piece.name)}"
            places = {"{run}": from_root(run), "{configs}": from_root(folder / "configs"),
                      "{smoke}": from_root(folder / "smoke")}  # fmt: skip
            log = folder / "logs" / f"{label(piece.name)}.log"
            log.unlink(missing_ok=True)
            command = piece.argv(places)
            again = partial(start, command, variables, log)
            running.append(_Running(piece, again(), log, time.monotonic(), run, again, piece.tries - 1))
        _wait(running, left)
    finally:
        for item in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(item.process.pid, signal.SIGKILL)
            item.process.wait()
    for item in running:
        outcomes[item.piece.name] = _ended(item, commit)
    return outcomes


def _wait(running: Sequence[_Running], left: Callable[[], float]) -> None:
    """Wait until each piece has ended or its time is over."""
    while any(item.end is None for item in running):
        now = time.monotonic()
        for item in running:
            if item.end is not None:
                continue
            if item.process.poll() is not None:
                if item.process.returncode not in ENDS and item.tries:  # it resumes where it stopped
                    item.process, item.tries = item.again(), item.tries - 1
                else:
                    item.end = now
            elif item.is_late(now) or left() <= 0:
                item.end, item.late = now, True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(item.process.pid, signal.SIGKILL)
        time.sleep(0.05)


def _ended(item: _Running, commit: str) -> Outcome:
    seconds = (item.end or time.monotonic()) - item.begin
    text = plain(item.log)
    code = item.process.returncode
    lines = [line for line in text if line]
    note = lines[-1][:160] if lines else ""
    if item.late:
        status, error = LATE, f"stopped after {seconds:.0f} s; its last output: {note or 'none'}"
    elif code in ENDS:
        status = ENDS[code]
        error = note if status == UNFINISHED else ""
    else:
        killed = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else ""
        status, error = FAILED, "\n".join(filter(None, (killed, first_error(lines))))
    made = item.run if item.run.is_dir() else item.run.with_name(f"{item.run.name}.json")
    found = _outcome(item.piece, commit, status, seconds, note)
    return replace(found, error=error, run=made.name if made.exists() else "")


def _outcome(piece: Piece, commit: str, status: str, seconds: float, note: str) -> Outcome:
    date = _now().isoformat(timespec="seconds")
    return Outcome(status, round(seconds, 1), note, digest(piece), commit, date)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def label(name: str) -> str:
    """Return a piece's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def digest(piece: Piece, root: Path = ROOT) -> str:
    """Return a digest of the piece's command and of its input files, which its outcome depends on."""
    found = hashlib.sha256(repr((piece.command, piece.without)).encode())
    for path in sorted({path for pattern in piece.inputs for path in root.glob(pattern)}):
        found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def from_root(path: Path) -> str:
    """Return a path as a piece sees it, which runs in the project's root: its results must not name this machine's."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def plain(log: Path) -> list[str]:
    """Return the lines of a log without colours, progress bars, rules and the path of the project's root."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return []
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).replace(f"{ROOT}{os.sep}", "")
    return [line.strip(" =") for line in re.split(r"[\r\n]+", text)]


def first_error(lines: Sequence[str]) -> str:
    """Return the last error in a log with the lines that follow it, or the log's last lines if it has no error."""
    named = [i for i, line in enumerate(lines) if re.match(r"(E +)?[\w.]*(Error|Exception|WrongResult)\b.*", line)]
    begin = named[-1] if named else max(0, len(lines) - ERROR_LINES)
    return "\n".join(line[:300] for line in lines[begin : begin + ERROR_LINES])
