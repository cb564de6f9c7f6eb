"""A tuned table on its way: written after every entry, gone on with later, and never again where a kernel killed it.

Before a configuration is launched its name is written down, and struck out when it is done. A process that dies or is
killed in between leaves the name behind; whoever goes on with the table then leaves that configuration out.
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

from fastres.bench.report.results import write_whole
from fastres.kernels.routing.rules import ConvConfig
from fastres.kernels.routing.tables import Block, Layer, Network, Table, Tuned, TunedBlock, from_json, to_json

DROPPED = "dropped.json"


@dataclass
class Progress:
    """A table, where it is written, and what was left out of it on the way.

    ``deadline`` is a time of ``time.monotonic``: no entry is begun after it. ``unfinished`` counts those.
    """

    path: Path
    facts: dict[str, object]
    table: Table
    deadline: float | None = None
    dropped: list[dict[str, Any]] = field(default_factory=list)  # configurations that ended their process
    problems: list[str] = field(default_factory=list)
    unfinished: int = 0

    @classmethod
    def resume(cls, path: Path, facts: dict[str, object], seed: Path | None = None) -> Progress:
        """Go on with what ``path`` holds or, if it is not there, with the table ``seed``."""
        found = next((place for place in (path, seed) if place is not None and place.is_file()), None)
        table = from_json(found.read_text(), str(found)) if found else Table()
        noted = path.with_name(DROPPED)
        dropped = json.loads(noted.read_text()) if noted.is_file() else []
        return cls(path, facts, table, dropped=dropped)

    def add(self, part: str, entry: Tuned | TunedBlock | Network) -> None:
        """Add to a part of the table, and write it."""
        self.table = replace(self.table, **{part: (*getattr(self.table, part), entry)})
        write_whole(self.path, to_json(self.table, self.facts).encode())

    def until(self, deadline: float | None) -> Progress:
        """Begin no entry after ``deadline``."""
        self.deadline = deadline
        return self

    def fill(
        self, part: str, todo: Mapping[Any, Any], known: Iterable[Any],
        run: Callable[[Any], Tuned | TunedBlock | Network | None],
    ) -> None:  # fmt: skip
        """Add what ``run`` makes of each item of ``todo`` (by what it is tuned for) that is not ``known``."""
        from tqdm import tqdm

        done = set(known)
        left = [item for key, item in todo.items() if key not in done]
        for index, item in enumerate(tqdm(left, desc=part, unit="entry")):
            if self.deadline is not None and time.monotonic() > self.deadline:
                self.unfinished += len(left) - index
                break
            if (entry := run(item)) is not None:
                self.add(part, entry)

    @contextmanager
    def trying(self, layer: Layer | Block, config: ConvConfig) -> Iterator[None]:
        """While it lasts, the configuration stands in a file beside the table as one that ended its process."""
        self._note([*self.dropped, _named(layer, config)])
        try:
            yield
        except KeyboardInterrupt:  # whoever stops the tuner blames no configuration
            self._note(self.dropped)
            raise
        self._note(self.dropped)

    def ended_a_process(self, layer: Layer | Block, config: ConvConfig) -> bool:
        """Whether a process died, or was stopped, while it tried this."""
        return _named(layer, config) in self.dropped

    def _note(self, dropped: list[dict[str, Any]]) -> None:
        write_whole(self.path.with_name(DROPPED), (json.dumps(dropped, indent=1) + "\n").encode())


def _named(layer: Layer | Block, config: ConvConfig) -> dict[str, Any]:
    return {"layer": asdict(layer), "config": {key: value for key, value in asdict(config).items() if key != "note"}}


def runs_right(error: Callable[[], float], dtype: str, what: str, progress: Progress) -> bool:
    """Whether a kernel's ``error`` is small. One that raises is a problem; one that breaks the GPU ends the process."""
    try:
        found = error()
    except (RuntimeError, triton.runtime.errors.TritonError) as problem:
        torch.cuda.synchronize()  # raises where the GPU can no longer be used: then this process is done
        progress.problems.append(f"{what} raises {type(problem).__name__}: {problem}".splitlines()[0])
        return False
    if not found < 2 * torch.finfo(getattr(torch, dtype)).eps:
        progress.problems.append(f"{what} is wrong: off by {found:.2e}")
        return False
    return True
