"""The report that ``fastres.classify`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastres.text import path_text


@dataclass(frozen=True)
class Report:
    """The result of a run.

    ``rows`` is the number of rows in the output. ``errors`` of them have an error instead of classes, and ``resumed``
    of them were computed by earlier runs. ``recomputed`` rows of earlier runs were damaged or missing, so this run
    computed them again. ``skipped`` images have no row, because of a rule: hidden names, and further images of a tar
    sample. ``seconds`` is the time of this run. ``output`` is a path, or a URL.

    The report of a shard counts its own rows. ``shard`` is ``"3/16"``, and ``missing`` is how many rows of the whole
    run nobody had finished at its end. ``html`` is the path of the page, if one was written.
    """

    output: Path | str
    rows: int
    errors: int
    resumed: int
    seconds: float
    recomputed: int = 0
    skipped: int = 0
    shard: str | None = None
    missing: int = 0
    html: Path | None = None

    @property
    def images_per_s(self) -> float:
        return (self.rows - self.resumed) / self.seconds

    def __str__(self) -> str:
        earlier, rate = "", f"{self.seconds:.1f} s, {self.images_per_s:.1f} images/s"
        if self.resumed and self.resumed == self.rows:
            earlier, rate = ", all of them computed earlier", f"{self.seconds:.1f} s"
        elif self.resumed:
            earlier = f", {self.resumed:,} of them from earlier runs"
        again = f", {self.recomputed:,} computed again" if self.recomputed else ""
        skipped = f", {self.skipped:,} images skipped (hidden, or not first in their sample)" if self.skipped else ""
        counts = f"{self.rows:,} rows{earlier}{again}, {self.errors:,} with errors{skipped} ({rate})"
        text = f"{path_text(self.output)}: {counts}"
        if self.html is not None:
            text += f"; the page is {path_text(self.html)}"
        if self.shard is None:
            return text
        if self.missing:
            return f"shard {self.shard} of {text}; {self.missing:,} rows of other shards are missing"
        return f"shard {self.shard} of {text}; the rows of all shards are finished"
