"""``make gpu VISIT=first``: measure this machine's GPU, and keep every result even if some pieces fail.

A visit is a list of pieces (``pieces.py``), the most valuable first. Each piece runs in its own process and is stopped
at its time limit. If the trial of a family of kernels crashes, hangs or gives a wrong result, the rest of the visit
leaves that family out and reports its name. After each piece the visit writes all results so far into one archive,
which ``make gpu-home`` unpacks. A piece that passed runs again only if a file that it depends on has changed; its
earlier rows are kept even then. Each card has its own folder. A visit does not access the internet.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastres.bench.measure.environment import commit
from fastres.bench.visit.pieces import FULL, Piece, Scale, estimate, groups, pieces
from fastres.bench.visit.running import ABSENT, LATE, LEAST_SECONDS, Outcome, Start, run_together, start
from fastres.commands.environment import installed_version
from fastres.errors import FastresError
from fastres.kernels.routing import tables
from fastres.kernels.routing.without import VARIABLE as WITHOUT
from fastres.kernels.routing.without import can_be_left_out
from fastres.text import text_table

from . import state as states

RESERVE = 4  # seconds kept for the last archive


@dataclass
class Visit:
    """A visit: its pieces, the card, the folders and the time limit.

    ``folder`` is the card's folder. The archive goes to ``out``. ``before`` lists the records of earlier visits.
    """

    name: str
    card: str
    folder: Path
    out: Path
    budget: float
    scale: Scale = FULL
    before: tuple[Path, ...] = ()
    again: bool = False
    only: tuple[str, ...] = ()
    start: Start = start
    variables: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        self.todo = pieces(self.name, self.scale)
        if unknown := [name for name in self.only if name not in {piece.name for piece in self.todo}]:
            raise FastresError(f"{self.name} has no piece called {unknown[0]!r}; --dry lists its pieces")
        self.state = states.read(*self.before, self.folder / states.STATE)
        self.began = time.monotonic()
        self.commit = commit()
        self.troubles: list[str] = []

    @property
    def left(self) -> float:
        """The seconds of the budget that are left for pieces."""
        return self.budget - RESERVE - (time.monotonic() - self.began)

    def is_due(self, piece: Piece) -> bool:
        """Return True if this visit must run the piece."""
        if self.only:
            return piece.name in self.only
        builds_on = [other for other in self.todo if other.name == piece.after]
        return self.again or not states.is_done(piece, self.state) or any(map(self.is_due, builds_on))

    def run(self) -> int:
        """Run the due pieces while there is time. Return exit status 0 if every piece of the visit is done."""
        due = [piece for piece in self.todo if self.is_due(piece)]
        self._say(self.plan(due))
        todo = groups(due)
        for index, group in enumerate(todo, start=1):
            if self.left < LEAST_SECONDS:
                rest = [piece for later in todo[index - 1 :] for piece in later]
                self._say(f"The time limit of {self.budget - RESERVE:.0f} s is reached; not started: {_names(rest)}")
                break
            self._say(f"[{index}/{len(todo)}] {_names(group)} (about {estimate(group)} s) …")
            found = run_together(
                group, self.folder, lambda: self.left, self.environment(group[0]), self.commit, self.start
            )
            self.state |= found
            for name, outcome in found.items():
                self._say(f"    {name}: {outcome.status} in {outcome.seconds} s{_reason(outcome)}")
            self.save()
        self._finish()
        return 1 if self.troubles else states.worst(self.state, self.todo)

    def plan(self, due: Sequence[Piece]) -> str:
        """Return a table of the pieces to run and their expected times."""
        rows: list[tuple[str, ...]] = [("piece", "about s", "at most s", "total s")]
        total = 0
        for group in groups(due):
            total += estimate(group)
            rows += [(piece.name, str(piece.seconds), str(piece.limit), str(total)) for piece in group]
        skipped = len(self.todo) - len(due)
        known = f" {skipped} of its pieces are already done." if skipped else ""
        fits = "All pieces fit." if total <= self.budget else "Not all pieces fit. Run the visit again for the rest."
        title = f"{self.name} on {self.card}: about {total} s of {self.budget:.0f} s. {fits}{known}"
        return f"{text_table(rows, right=(1, 2, 3))}\n{title}"

    def environment(self, piece: Piece) -> dict[str, str]:
        """Return a piece's environment variables: tuned tables, left-out families, the compilers' cache folder, …"""
        can_be = [family for family in self.left_out() if can_be_left_out(family)]
        without = [] if piece.family else [*can_be, *filter(None, [piece.without])]
        own = {
            tables.VARIABLE: str(self.folder / "configs"),
            WITHOUT: ",".join(without),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "FASTRES_COMMIT": self.commit,
            "PYTHONUNBUFFERED": "1",
        }
        return {**(os.environ if self.variables is None else self.variables), **own}

    def left_out(self) -> dict[str, Outcome]:
        """Return the families of kernels that are left out, with the outcome of their trials."""
        return states.left_out(pieces("first", self.scale), self.state)

    def save(self) -> None:
        """Write the record and the archive. If that fails, say so and try again after the next piece."""
        facts = {"card": self.card, "torch": torch.__version__, "triton": installed_version("triton")}
        try:
            states.write(self.folder / states.STATE, self.state, facts)
            missing = states.pack(self.folder, self.out / states.ARCHIVE)
            lost = [name for name in missing if "/inductor/" not in name]
            self.troubles = [f"the archive had no room for {name}" for name in lost]
        except (OSError, FastresError) as error:
            self.troubles = [f"the archive dates from an earlier piece: {error}"]
            self._say(f"    The archive was not written: {error}")

    def _finish(self) -> None:
        rows: list[tuple[str, ...]] = [("piece", "status", "seconds", "commit", "last line")]
        for piece in self.todo:
            outcome = self.state.get(piece.name)
            if outcome is None:
                rows.append((piece.name, "not run", "", "", ""))
                continue
            older = "" if states.is_done(piece, self.state) or outcome.status == LATE else " (older)"
            stamp = outcome.commit + older * (outcome.commit != self.commit)
            rows.append((piece.name, outcome.status, f"{outcome.seconds:.0f}", stamp, outcome.note[:80]))
        self._say(text_table(rows, right=(2,)))
        for family, outcome in self.left_out().items():
            self._say(f"Left out: {family}: {outcome.status}{_reason(outcome)}")
        for trouble in self.troubles:
            self._say(f"Problem: {trouble}")
        spent = time.monotonic() - self.began
        self._say(f"{spent:.0f} s on {self.card}; the results are in {self.out / states.ARCHIVE}")

    @staticmethod
    def _say(text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end a visit that can still save results
            print(text, flush=True)


def _names(some: Sequence[Piece]) -> str:
    return ", ".join(piece.name for piece in some)


def _reason(outcome: Outcome) -> str:
    reason = outcome.note if outcome.status == ABSENT else outcome.error
    return f": {' / '.join(reason.splitlines())}" if reason else ""
