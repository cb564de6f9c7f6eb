"""``make gpu-home ARCHIVE=…``: unpack the archive of a visit and put its results into the repository.

For each card in the archive it writes:

- the runs to ``bench/results/<card>/runs``;
- all runs merged into one ``results.json``, with its charts and its report;
- the record of the visit next to the results;
- the tuned table to ``kernels/configs/<card>``.

It also writes the measurements next to the estimates into ``docs/performance.md``. Existing results are kept. If one
engine has two rows for one setting, the later row counts, unless it was not measured. You can run this twice safely.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastres.bench.report import results, show
from fastres.bench.report.results import ABSENT, OK, LayerRow, Results, Row, read_text, write_whole
from fastres.bench.report.standing import groups
from fastres.errors import FastresError
from fastres.kernels.routing.cards import CARDS
from fastres.kernels.routing.tables import FOLDER as CONFIGS
from fastres.kernels.routing.tables import Table, from_json, to_json
from fastres.program import run_program
from fastres.text import text_table

from . import state as states
from .running import FINAL, RESULTS, ROOT

PAGE = ROOT / "docs" / "performance.md"
WORK = ROOT / "out" / "gpu"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SHOWN = ("fastres", "eager", "eager_channels_last", "eager_cudagraph", "compile", "compile_max_autotune")


def unpack(archive: Path, into: Path) -> list[Path]:
    """Unpack an archive and return its folders, one per card. Raise ``FastresError`` if no visit wrote the archive."""
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(into, filter="data")
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise FastresError(
            f"{archive} cannot be unpacked ({error}); give the {states.ARCHIVE} that make gpu writes"
        ) from error
    cards = sorted(path.parent for path in into.glob(f"*/{states.STATE}"))
    if not cards:
        raise FastresError(f"{archive} contains no visit; give the {states.ARCHIVE} that make gpu writes")
    return cards


def merged(runs: Sequence[Results], left_out: Sequence[dict[str, str]] = ()) -> Results:
    """Merge the runs of one card, given in the order in which they were made.

    For each engine and setting, keep the latest row that was measured. The layers of a setting come from its latest run
    that has any. ``left_out`` lists the families of kernels that did not pass their trial.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    layers: dict[tuple[Any, ...], tuple[LayerRow, ...]] = {}
    ceilings: dict[str, Any] = {}
    for run in runs:
        ceilings |= run.environment["ceilings"]
        for row in run.rows:
            key = (row.model, row.size, row.batch, row.dtype, row.engine)
            measured = row.status != ABSENT and (row.status != OK or row.p50_ms is not None)
            if measured or key not in rows:
                rows[key] = row
        found: dict[tuple[Any, ...], list[LayerRow]] = {}
        for layer in run.layers:
            found.setdefault((layer.model, layer.size, layer.batch, layer.dtype), []).append(layer)
        layers |= {key: tuple(of) for key, of in found.items()}
    last = runs[-1].environment
    environment = {
        **last,
        "command": "make gpu",
        "ceilings": ceilings,
        "complete": all(row.p50_ms is not None for row in rows.values() if row.status == OK),
        "commits": sorted({str(run.environment.get("commit", "")) for run in runs}),
        "runs": [run.environment for run in runs],
        "left_out": list(left_out),
    }
    ordered = sorted(rows.values(), key=lambda row: (row.model, row.dtype, row.batch))
    return Results(environment, results.with_float32_ratios(ordered), sum(layers.values(), ()))


def stamped(run: Results, name: str) -> Results:
    """Return the run with its commit in each row, because rows of several runs are merged later."""
    commit = str(run.environment.get("commit", ""))
    rows = tuple(row if row.commit else replace(row, commit=commit) for row in run.rows)
    return Results({**run.environment, "run": name}, rows, run.layers)


def merged_tables(old: Table, new: Table) -> Table:
    """Return the entries of both tables. If both have an entry, the new one wins."""
    layers = {entry.layer: entry for table in (old, new) for entry in table.layers}
    blocks = {entry.layer: entry for table in (old, new) for entry in table.blocks}
    networks = {entry.case: entry for table in (old, new) for entry in table.networks}
    return Table(tuple(layers.values()), tuple(blocks.values()), tuple(networks.values()))


def bring(card: Path, results_folder: Path = RESULTS, configs: Path = CONFIGS) -> list[Path]:
    """Copy one card's folder into the repository. Return the files written."""
    home = results_folder / card.name
    written: list[Path] = []
    for path in sorted((card / "runs").glob("*")):
        source = path / results.JSON_NAME if path.is_dir() else path
        if source.is_file():
            target = home / "runs" / f"{path.stem if path.is_file() else path.name}.json"
            text = stamped(results.read(source), target.stem).as_json() if path.is_dir() else read_text(source)
            write_whole(target, text.encode())
            written.append(target)
    state = states.read(home / states.STATE, card / states.STATE)
    states.write(home / states.STATE, state, states.facts(card / states.STATE))
    written.append(home / states.STATE)
    for path in sorted((card / "smoke").glob("*.json")):
        write_whole(home / "smoke" / path.name, path.read_bytes())
        written.append(home / "smoke" / path.name)
    runs = read_runs(home)
    if runs:
        whole = merged(runs, exclusions(state))
        written += [*results.write(whole, home), *show.write(whole, home)]
    for path in sorted((card / "configs").glob("*/conv.json")):
        target = configs / path.parent.name / path.name
        old = from_json(read_text(target), str(target)) if target.is_file() else Table()
        text = read_text(path)
        new = from_json(text, str(path))
        facts = {key: value for key, value in json.loads(text).items() if key not in _PARTS}
        write_whole(target, to_json(merged_tables(old, new), facts).encode())
        written.append(target)
    return written


_PARTS = ("format", "layers", "blocks", "networks")


def read_runs(home: Path) -> list[Results]:
    """Return a card's benchmark runs, in the order in which they were made."""
    paths = sorted((home / "runs").glob("*.json"))
    return [results.read(path) for path in paths if _has_rows(path)]


def _has_rows(path: Path) -> bool:
    """Return False for the results of other benchmarks."""
    try:
        return "rows" in json.loads(read_text(path))
    except (ValueError, TypeError, RecursionError) as error:
        raise FastresError(f"{path} cannot be read as benchmark results ({error}); move it away") from error


def exclusions(state: states.State) -> list[dict[str, str]]:
    """Return the families of kernels that did not pass: name, status, first lines of the error, and commit."""
    trials = {name.removeprefix("smoke "): outcome for name, outcome in state.items() if name.startswith("smoke ")}
    return [
        {"family": family, "status": outcome.status, "error": outcome.error, "commit": outcome.commit}
        for family, outcome in sorted(trials.items())
        if outcome.status not in FINAL
    ]


def cards_at_home(results_folder: Path = RESULTS) -> Iterable[tuple[str, Results]]:
    """Yield the name and the results of each visited card."""
    for path in sorted(results_folder.glob(f"*/{states.STATE}")):
        if (path.parent / results.JSON_NAME).is_file():
            yield path.parent.name, results.read(path.parent / results.JSON_NAME)


def measured_text(cards: Iterable[tuple[str, Results]], estimate: Any = None) -> str:
    """Return Markdown: for each card, a table of estimates and measurements, and the families that were left out."""
    parts = []
    for folder, found in cards:
        where = found.environment
        lines = [
            f"### {where['gpu']}",
            "",
            f"`bench/results/{folder}/results.json`: torch {where['torch']}, Triton {where['triton']}, "
            f"commit {where.get('commit') or 'unknown'}, {str(where['date'])[:10]}. Milliseconds a batch, medians.",
            "",
        ]
        rows: list[tuple[str, ...]] = [("model", "dtype", "batch", "estimated", *SHOWN, "images/s", "error")]
        for (model, size, dtype), batches in groups(found.rows):
            for members in batches:
                by_engine = {row.engine: row for row in members}
                own, batch = by_engine.get("fastres"), members[0].batch
                expected = None if estimate is None else estimate(where["gpu"], model, batch, size, dtype)
                cells = [_cell(by_engine.get(engine)) for engine in SHOWN]
                speed = f"{own.images_per_s:,.0f}" if own and own.images_per_s else ""
                error = f"{own.max_rel_error:.1e}" if own and own.max_rel_error else ""
                ms = "" if expected is None else f"{1e3 * expected:.3g}"
                rows.append((model, dtype, str(batch), ms, *cells, speed, error))
        lines += ["| " + " | ".join(row) + " |" for row in (rows[0], ("---",) * len(rows[0]), *rows[1:])]
        for entry in where.get("left_out", ()):
            reason = entry["error"].splitlines()[0] if entry["error"] else ""
            lines.append(f"\nLeft out: `{entry['family']}`, {entry['status']}: {reason}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) if parts else "fastres has not been measured on a GPU yet."


def estimated(gpu_name: str, model: str, batch: int, size: int, dtype: str) -> float | None:
    """Return the estimated seconds per batch with the rules on a card, or None if the card is not known."""
    from fastres.bench.estimates.by_card import estimate_card

    exact = [card for card in CARDS if card.name == gpu_name]
    like = [card for card in CARDS if re.search(rf"\b{re.escape(card.name)}\b", gpu_name)]
    for card in (*exact, *like):
        return estimate_card(card, model, batch, size, getattr(torch, dtype), plain=False).ms / 1e3
    return None


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return row.status if row.p50_ms is None else f"{row.p50_ms:.3g}"


def write_page(text: str, page: Path = PAGE) -> None:
    """Replace the text between the page's two marks with the measurements."""
    before = page.read_text()
    if before.count(BEGIN) != 1 or before.count(END) != 1:
        raise FastresError(f"{page} must have the marks {BEGIN} and {END} once each")
    found = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{text}\n\n{END}", before, flags=re.S)
    write_whole(page, found.encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Import an archive. Return exit status 2 if no visit wrote it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.visit.home", description="Put the results of a visit into the repository."
    )
    parser.add_argument("archive", type=Path, help=f"the {states.ARCHIVE} that make gpu wrote")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for card in unpack(options.archive, Path(folder)):
                written = bring(card)
                outcomes = states.read(RESULTS / card.name / states.STATE)
                lines = [("piece", "status", "commit"), *((n, o.status, o.commit) for n, o in outcomes.items())]
                print(f"{text_table(lines)}\n{card.name}: {len(written)} files written")
                if (card / "inductor").is_dir():  # so that the next visit need not compile again
                    shutil.copytree(card / "inductor", WORK / card.name / "inductor", dirs_exist_ok=True)
        write_page(measured_text(cards_at_home(), estimated))
    except FastresError as error:
        print(f"python -m bench.visit.home: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m bench.visit.home"))
