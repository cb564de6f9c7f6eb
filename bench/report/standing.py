"""The ranking of a run: the engine with the shortest median for each setting, and how far fastres is behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .results import OK, Row

FASTRES, EAGER = "fastres", "eager"
Key = tuple[str, int, str]  # model, size, dtype


@dataclass(frozen=True)
class Point:
    """One setting in which fastres and at least one other engine were timed."""

    fastres: Row
    fastest: Row
    fastest_peer: Row

    @property
    def is_fastest(self) -> bool:
        return self.fastest.engine == FASTRES

    @property
    def behind(self) -> float:
        """How much longer fastres's median is than the fastest engine's, as a fraction: 0.1 is 10 % longer."""
        return median(self.fastres) / median(self.fastest) - 1

    @property
    def ahead(self) -> float:
        """The fastest other engine's median divided by fastres's."""
        return median(self.fastest_peer) / median(self.fastres)

    @property
    def overlaps(self) -> bool:
        """Whether the p20–p80 ranges of fastres and the fastest engine overlap."""
        low, high = self.fastres.p20_ms, self.fastest.p80_ms
        return low is not None and high is not None and low <= high


def groups(rows: Sequence[Row]) -> Iterator[tuple[Key, list[list[Row]]]]:
    """Group the rows by (model, size, dtype), then by batch."""
    by_key: dict[Key, dict[int, list[Row]]] = {}
    for row in rows:
        by_key.setdefault((row.model, row.size, row.dtype), {}).setdefault(row.batch, []).append(row)
    for key, batches in by_key.items():
        yield key, list(batches.values())


def compared(rows: Sequence[Row]) -> bool:
    """Return True if an engine other than eager PyTorch was timed among the rows of one setting."""
    return any(row.engine != EAGER and row.status == OK for row in rows)


def median(row: Row) -> float:
    assert row.p50_ms is not None
    return row.p50_ms


def timed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.status == OK and row.p50_ms is not None]


def fastest(rows: Sequence[Row]) -> Row | None:
    """Return the row of one setting with the shortest median, or ``None`` if fewer than two engines were timed."""
    ranked = sorted(timed(rows), key=median)
    return ranked[0] if len(ranked) > 1 else None


def roofline_speed(rows: Sequence[Row]) -> float | None:
    """Return the images per second at the roofline of one setting."""
    known = [1e3 * row.batch / row.roofline_ms for row in rows if row.roofline_ms]
    return known[0] if known else None


def points(rows: Sequence[Row]) -> list[Point]:
    """Return every setting in which fastres and another engine were timed."""
    found = []
    for _, batches in groups(rows):
        for members in batches:
            ranked = sorted(timed(members), key=median)
            own = [row for row in ranked if row.engine == FASTRES]
            peers = [row for row in ranked if row.engine != FASTRES]
            if own and peers:
                found.append(Point(own[0], ranked[0], peers[0]))
    return found


def verdict(rows: Sequence[Row]) -> tuple[str, list[Point]]:
    """Return a sentence on fastres's rank, and the points at which it is not the fastest, worst first.

    A median is within the spread of the fastest one if the p20–p80 ranges of the two overlap.
    """
    found = points(rows)
    lost = sorted((point for point in found if not point.is_fastest), key=lambda point: -point.behind)
    if not found:
        return "fastres was not timed together with another engine.", []
    if not lost:
        everywhere = "the only point" if len(found) == 1 else f"all {len(found)} points"
        return f"fastres is the fastest engine at {everywhere}.", []
    close = sum(point.overlaps for point in lost)
    more = f", and within the spread of the fastest at {close} more" if close else ""
    return f"fastres is the fastest engine at {len(found) - len(lost)} of {len(found)} points{more}.", lost


def sentence(point: Point) -> str:
    """Return a sentence that says where fastres is slower, and by how much."""
    row, best = point.fastres, point.fastest
    noise = "; their p20–p80 ranges overlap" if point.overlaps else ""
    return (
        f"{row.model}, {row.dtype}, {row.size}×{row.size}, batch {row.batch}: fastres takes {point.behind:.1%} longer "
        f"than {best.engine} ({median(row):.4g} ms compared with {median(best):.4g} ms{noise})"
    )
