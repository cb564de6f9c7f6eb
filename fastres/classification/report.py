"""The report that ``fastres.classify`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """The result of a run.

    ``rows`` is the number of rows in the output. ``errors`` of them have an error instead of classes, and ``resumed``
    of them were written by earlier runs. ``seconds`` is the time of this run.
    """

    output: Path
    rows: int
    errors: int
    resumed: int
    seconds: float

    @property
    def images_per_s(self) -> float:
        return (self.rows - self.resumed) / self.seconds

    def __str__(self) -> str:
        earlier = f", {self.resumed:,} of them from earlier runs" if self.resumed else ""
        rate = f"{self.seconds:.1f} s, {self.images_per_s:.1f} images/s"
        return f"{self.output}: {self.rows:,} rows{earlier}, {self.errors:,} with errors ({rate})"
