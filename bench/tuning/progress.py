"""The progress of a tuning run: the table is written after every entry, so that a later run can continue it.

Before a configuration is launched, it is listed in a file, and it is removed from the file when the launch is done. If
the process dies or is killed in between, it stays in the file, and the next run leaves it out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton

from fastres.bench.report.results import read_text, write_whole
from fastres.errors import FastresError
from fastres.kernels.routing.rules import ConvConfig
from fastres.kernels.routing.tables import Block, Layer, Network, Table, Tuned, TunedBlock, from_json, to_json
from fastres.terminal import progress_bar

DROPPED = "dropped.json"
LONGEST_MESSAGE = 600  # characters of an exception in a problem


@dataclass
class Progress:
    """A table, its path, and the configurations and problems that were left out of it.

    ``deadline`` is a time of ``time.monotonic`` after which no entry is started. ``unfinished`` counts the entries that
    were not started.
    """

    path: Path
    facts: dict[str, object]
    table: Table
    deadline: float | None = None
    dropped: list[dict[str, Any]] = field(default_factory=list)  # configurations that killed their process
    problems: list[str] = field(default_factory=list)
    unfinished: int = 0

    @classmethod
    def resume(cls, path: Path, facts: dict[str, object], seed: Path | None = None) -> Progress:
        """Continue the table at ``path`` or, if there is none, the table at ``seed``."""
        found = next((place for place in (path, seed) if place is not None and place.is_file()), None)
        table = from_json(read_text(found), str(found)) if found else Table()
        noted = path.with_name(DROPPED)
        return cls(path, facts, table, dropped=_read_dropped(noted) if noted.is_file() else [])

    def add(self, part: str, entry: Tuned | TunedBlock | Network) -> None:
        """Add an entry to a part of the table, and write the table."""
        self.table = replace(self.table, **{part: (*getattr(self.table, part), entry)})
        write_whole(self.path, to_json(self.table, self.facts).encode())

    def until(self, deadline: float | None) -> Progress:
        """Start no entry after ``deadline``."""
        self.deadline = deadline
        return self

    def fill(
        self, part: str, todo: Mapping[Any, Any], known: Iterable[Any],
        run: Callable[[Any], Tuned | TunedBlock | Network | None],
    ) -> None:  # fmt: skip
        """Add the result of ``run`` for each item of ``todo`` whose key is not in ``known``."""

        done = set(known)
        left = [item for key, item in todo.items() if key not in done]
        for index, item in enumerate(progress_bar(left, desc=part, unit="entry")):
            if self.deadline is not None and time.monotonic() > self.deadline:
                self.unfinished += len(left) - index
                break
            if (entry := run(item)) is not None:
                self.add(part, entry)

    @contextmanager
    def trying(self, layer: Layer | Block, config: ConvConfig) -> Iterator[None]:
        """Within the context, list the configuration in a file next to the table as one that killed its process."""
        self._note([*self.dropped, _named(layer, config)])
        try:
            yield
        except KeyboardInterrupt:  # the user stopped the tuner, so the configuration is not at fault
            self._note(self.dropped)
            raise
        self._note(self.dropped)

    def ended_a_process(self, layer: Layer | Block, config: ConvConfig) -> bool:
        """Return True if a process died or was stopped while it tried this configuration."""
        return _named(layer, config) in self.dropped

    def _note(self, dropped: list[dict[str, Any]]) -> None:
        write_whole(self.path.with_name(DROPPED), (json.dumps(dropped, indent=1) + "\n").encode())


def _read_dropped(path: Path) -> list[dict[str, Any]]:
    try:
        dropped = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise FastresError(f"{path} is not JSON ({error}); delete it to try all configurations again") from error
    if not isinstance(dropped, list) or not all(isinstance(entry, dict) for entry in dropped):
        raise FastresError(f"{path} is not a list of configurations; delete it to try all configurations again")
    return dropped


def _named(layer: Layer | Block, config: ConvConfig) -> dict[str, Any]:
    return {"layer": asdict(layer), "config": {key: value for key, value in asdict(config).items() if key != "note"}}


def runs_right(error: Callable[[], float], dtype: str, what: str, progress: Progress) -> bool:
    """Return True if a kernel's ``error`` is small. Record a problem if it is not, or if the kernel raises.

    If the kernel leaves the GPU unusable, the exception ends the process.
    """
    try:
        found = error()
    except (RuntimeError, triton.runtime.errors.TritonError) as problem:
        torch.cuda.synchronize()  # raises if the GPU is no longer usable, which ends this process
        said = "; ".join(filter(None, str(problem).splitlines()))[:LONGEST_MESSAGE]  # a driver lists what it refuses
        progress.problems.append(f"{what} raises {type(problem).__name__}: {said}")
        return False
    if not found < 2 * torch.finfo(getattr(torch, dtype)).eps:
        progress.problems.append(f"{what} is wrong: its relative error is {found:.2e}")
        return False
    return True
