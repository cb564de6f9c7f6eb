"""``python -m bench.gpu --rehearse``: run complete visits on a pretend GPU, with injected faults, and check them.

The pieces are those of a real visit, with their processes, limits, archive and import. The GPU is the pretend one of
``bench/pretend_gpu``, the kernels are interpreted, the network and its batches are small, and ``stage.py`` replaces the
other slow parts.

In the first visit one family of kernels raises, one hangs, one is wrong, a process is killed, and the time runs out
during a piece. In another visit the disk fills up. Each time the archive must be complete and correct, and the next
visit must continue from there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastres.bench.report import results
from fastres.kernels.routing import tables
from fastres.text import text_table

from . import home, stage
from . import state as states
from .pieces import Scale
from .running import ABSENT, FAILED, LATE, PASSED, Outcome, label
from .visit import Visit

SMALL = Scale("resnet20", 8, ("2", "1"), others=(("resnet20_digits", "1"),), dtypes=("float32",), small=True)
CARD = stage.CARD.name
# The faults of the first visit: (what happens, the family of kernels or the piece that it happens to).
KILLED, STALLED = (f"rules resnet20 float16 batch {batch}" for batch in SMALL.batches)
FAULTS = (("raises", "gemm"), ("hangs", "fused"), ("wrong", "conv_tma"), ("kills", KILLED), ("stalls", STALLED))
SECONDS_OF_A_HANG, PATIENCE = 6, 300
FULL_AT = 4096  # bytes: no file may grow larger once the disk is "full"


class Played:
    """A process of the rehearsal, forked from a server that has already imported everything."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int:
        self._process.join()
        return self.returncode or 0


@dataclass
class Theatre:
    """Starts each piece as a process on the pretend GPU, with the faults of the current visit."""

    faults: stage.Faults = ()
    largest: int | None = None  # bytes a file may have, to imitate a full disk

    def start(self, command: Sequence[str], variables: Mapping[str, str], log: Path) -> Played:
        context = multiprocessing.get_context("forkserver")
        words = list(command[2:])  # without the interpreter and its -m
        given = (words, dict(variables), str(log), tuple(self.faults), log.stem, self.largest)
        process = context.Process(target=stage.play, args=given, daemon=False)
        process.start()
        return Played(process)


@dataclass
class Rehearsed(Visit):
    """A visit that runs out of time while the piece ``ends_in`` runs."""

    ends_in: str = ""
    faults: stage.Faults = ()

    @property
    def left(self) -> float:
        log = self.folder / "logs" / f"{label(self.ends_in)}.log"
        over = bool(self.ends_in) and log.is_file() and stage.STALLED in log.read_text(errors="replace")
        return 0.0 if over else self.budget

    def __post_init__(self) -> None:
        """Raise the time limits of the pieces, because this machine may be slow and busy."""
        super().__post_init__()
        hanging = {f"smoke {where}" for what, where in self.faults if what == "hangs"}
        self.todo = [
            replace(piece, limit=SECONDS_OF_A_HANG if piece.name in hanging else PATIENCE) for piece in self.todo
        ]


@dataclass
class Checks:
    """The checks made so far: scene, what is checked, and whether it holds."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    scene: str = ""

    def that(self, what: str, is_so: object, found: object = "") -> None:
        self.rows.append((self.scene, what, "yes" if is_so else f"NO: {found}"))
        print(f"    {'✓' if is_so else '✗'} {what}" + ("" if is_so else f": {found}"), flush=True)

    def equal(self, what: str, found: object, expected: object) -> None:
        self.that(what, found == expected, f"{found!r} instead of {expected!r}")

    @property
    def failed(self) -> int:
        return sum(verdict != "yes" for *_, verdict in self.rows)


@contextlib.contextmanager
def scene(checks: Checks, title: str) -> Iterator[None]:
    """Print a scene's title and its time. A scene is one visit, or one import, with its checks."""
    print(f"\n== {title}", flush=True)
    checks.scene, began = title, time.monotonic()
    yield
    print(f"   {time.monotonic() - began:.0f} s", flush=True)


def rehearse(out: Path) -> int:
    """Run all scenes and leave their files in ``out``. Return exit status 0 if every check holds."""
    os.environ["TRITON_INTERPRET"] = "1"  # for the processes: Triton reads it when it is imported
    os.environ.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")
    multiprocessing.get_context("forkserver").set_forkserver_preload([stage.__name__])
    began, checks, theatre = time.monotonic(), Checks(), Theatre()
    out = out.resolve() / "rehearsal"
    shutil.rmtree(out, ignore_errors=True)

    def visit(name: str, *faults: tuple[str, str], ends_in: str = "", only: tuple[str, ...] = ()) -> Rehearsed:
        theatre.faults = faults
        folder = out / "work" / tables.slug(CARD)
        variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
        return Rehearsed(
            name, CARD, folder, out, 600.0, SMALL, only=only, start=theatre.start, variables=variables,
            ends_in=ends_in, faults=faults,
        )  # fmt: skip

    with scene(checks, "A first visit with every fault"):
        _everything_goes_wrong(visit("first", *FAULTS, ends_in=STALLED), checks)
    with scene(checks, "The disk fills up"):
        _the_disk_fills_up(visit("first", only=("environment", "smoke conv", KILLED)), theatre, checks)
    with scene(checks, "A second visit, without faults"):
        _a_second_visit(visit("first"), checks)
    with scene(checks, "Tuning"):
        _tuning(visit("tune"), checks)
    with scene(checks, "Peers"):
        _peers(visit("peers"), checks)
    with scene(checks, "Importing the archive"):
        _home(out / states.ARCHIVE, checks)
    print(f"\n{text_table([('scene', 'check', 'holds'), *checks.rows])}")
    print(f"{len(checks.rows) - checks.failed} of {len(checks.rows)} checks hold; {time.monotonic() - began:.0f} s")
    return 1 if checks.failed else 0


def archived(archive: Path) -> tuple[states.State, dict[str, results.Results]]:
    """Return an archive's record and its benchmark results by piece, the latest run of each."""
    with tempfile.TemporaryDirectory() as folder:
        (card,) = home.unpack(archive, Path(folder))
        found = {}
        for path in sorted((card / "runs").glob(f"*/{results.JSON_NAME}")):
            found[path.parent.name.partition("-")[2]] = results.read(path)
        return states.read(card / states.STATE), found


def _everything_goes_wrong(visit: Rehearsed, checks: Checks) -> None:
    checks.equal("the exit status is 1", visit.run(), 1)
    state, runs = archived(visit.out / states.ARCHIVE)
    checks.equal("every piece is in the record", set(state), {piece.name for piece in visit.todo})
    expected = {
        "smoke gemm": (FAILED, "an illegal memory access"), "smoke fused": (LATE, "stopped after"),
        "smoke conv_tma": (FAILED, "accepted: at most"), KILLED: (FAILED, "SIGKILL"), STALLED: (LATE, "stopped after"),
    }  # fmt: skip
    for name, (status, error) in expected.items():
        outcome = state.get(name, Outcome("missing", 0, "", "", "", ""))
        checks.that(
            f"{name} is {status}, with the reason", (outcome.status, error in outcome.error) == (status, True), outcome
        )
    left = set(visit.left_out())
    checks.that("the faulty families and those built on them are left out", {"gemm", "fused", "conv_tma"} <= left, left)
    good = {name for name in state if name.startswith("smoke")} - {f"smoke {family}" for family in left}
    checks.that("no other family is left out", {"smoke conv", "smoke split", "smoke stem", "smoke head"} <= good, good)
    for name in (KILLED, STALLED):
        run = runs.get(label(name))
        checks.that(f"{name}: its finished rows are in the archive", run is not None and len(run.rows) >= 2, run)
        if run is not None:
            checks.equal("they are marked as incomplete", run.environment["complete"], False)
            without = set(run.environment["without"].split(","))
            checks.that("they record what was left out", {"gemm", "fused", "conv_tma", "tables"} <= without, without)


def _the_disk_fills_up(visit: Rehearsed, theatre: Theatre, checks: Checks) -> None:
    before = (visit.out / states.ARCHIVE).read_bytes()
    theatre.largest = FULL_AT
    try:
        with stage.full_disk(FULL_AT):
            status = visit.run()
    finally:
        theatre.largest = None
    checks.equal("the exit status is 1", status, 1)
    checks.equal("the archive is unchanged", (visit.out / states.ARCHIVE).read_bytes(), before)
    checks.that("the visit reports it", any("earlier piece" in trouble for trouble in visit.troubles), visit.troubles)
    leftovers = [path.name for path in visit.out.glob(".*")]
    checks.equal("no partial files are left", leftovers, [])


def _a_second_visit(visit: Rehearsed, checks: Checks) -> None:
    due = {piece.name for piece in visit.todo if visit.is_due(piece)}
    known = {piece.name for piece in visit.todo} - due
    checks.that("pieces that passed are not due", {"compile", "smoke split", "smoke stem"} <= known, known)
    checks.that(
        "pieces that did not pass are due", {"smoke gemm", "smoke fused", "smoke conv_tma", KILLED, STALLED} <= due, due
    )
    checks.equal("the exit status is 0", visit.run(), 0)
    checks.equal("no family is left out", set(visit.left_out()), set())
    state, runs = archived(visit.out / states.ARCHIVE)
    checks.equal("no piece failed", {o.status for o in state.values()} - {PASSED, ABSENT}, set())
    for batch in SMALL.batches:
        run = runs[label(f"rules resnet20 float16 batch {batch}")]
        checks.equal(
            f"batch {batch}: every engine was right and timed",
            {row.engine for row in run.rows if row.status == results.OK and row.p50_ms and row.max_rel_error},
            {"eager", "eager_channels_last", "eager_cudagraph", "fastres"},
        )
        checks.that("the steps of fastres were timed", len(run.layers) > 10, len(run.layers))
    checks.equal("a third visit would run nothing", [piece.name for piece in visit.todo if visit.is_due(piece)], [])


def _tuning(visit: Rehearsed, checks: Checks) -> None:
    checks.equal("the exit status is 0", visit.run(), 0)
    path = tables.table_path(CARD, visit.folder / "configs")
    table = tables.from_json(path.read_text(), str(path))
    batches = {int(batch) for batch in SMALL.batches}
    checks.equal("layers of both batches are tuned", {entry.layer.shape.N for entry in table.layers}, batches)
    checks.equal("networks of both batches are tuned", {entry.batch for entry in table.networks}, batches)
    _, runs = archived(visit.out / states.ARCHIVE)
    tuned = [run for name, run in runs.items() if name.startswith("tuned")]
    checks.equal("fastres was timed with the table", [run.environment["without"] for run in tuned], [""] * len(batches))


def _peers(visit: Rehearsed, checks: Checks) -> None:
    checks.equal("the exit status is 0", visit.run(), 0)
    _, runs = archived(visit.out / states.ARCHIVE)
    for engine in ("compile", "compile_max_autotune"):
        run = runs[label(f"{engine} resnet20 float16 batch 1")]
        timed = {row.engine for row in run.rows if row.p50_ms}
        engines = {"eager", "eager_channels_last", "eager_cudagraph", engine, "fastres"}
        checks.equal(f"{engine} and fastres were timed", timed, engines)


def _home(archive: Path, checks: Checks) -> None:
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        for _ in range(2):  # the second time changes nothing
            (card,) = home.unpack(archive, folder / "archive")
            home.bring(card, folder / "results", folder / "configs")
            found = results.read(folder / "results" / card.name / results.JSON_NAME)
            text = (folder / "results" / card.name / results.JSON_NAME).read_text()
        again = (folder / "results" / card.name / results.JSON_NAME).read_text()
        checks.equal("importing twice gives the same files as importing once", text, again)
        cheap = {"eager", "eager_channels_last", "eager_cudagraph", "fastres"}
        for batch, slow in zip(SMALL.batches, ((), ("compile", "compile_max_autotune")), strict=True):
            wanted = cheap | set(slow)
            timed = {r.engine for r in found.rows if r.batch == int(batch) and r.dtype == "float16" and r.p50_ms}
            checks.equal(f"batch {batch}: one table has every engine", timed, wanted)
        checks.that("every row has its commit", all(row.commit for row in found.rows))
        names = {path.name for path in (folder / "results" / card.name).iterdir()}
        checks.that(
            "the report, the record and the CSV are written",
            {results.REPORT_NAME, states.STATE, results.CSV_NAME} <= names,
            names,
        )
        table = tables.table_path(CARD, folder / "configs")
        checks.that(
            "the tuned table is written", table.is_file() and len(tables.from_json(table.read_text(), "").layers) > 5
        )
        text = home.measured_text([(card.name, found)])
        checks.that("the page shows the measurements", all(f"| {batch} |" in text for batch in SMALL.batches), text)
