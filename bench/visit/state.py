"""The record of a card's visits so far, and the archive with all their results."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastres.bench.report.results import read_text, write_json
from fastres.errors import FastresError
from fastres.files import written_whole

from .pieces import Piece
from .running import FINAL, Outcome, digest

STATE, ARCHIVE = "visit.json", "gpu.tgz"
LARGEST_ARCHIVE = 16 * 10**6  # bytes: the machine with the GPU may refuse to send larger files
LONGEST_LOG = 100_000  # bytes at the end of a log that go into the archive
FIRST, LOGS, CACHES = range(3)

State = dict[str, Outcome]


def read(*paths: Path) -> State:
    """Return the latest outcome of each piece in these records. Raise ``FastresError`` if a record is damaged."""
    found: State = {}
    for path in paths:
        if not path.is_file():
            continue
        try:
            entries = {name: _outcome(entry) for name, entry in json.loads(read_text(path))["pieces"].items()}
        except (FastresError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FastresError(f"{path} is not a readable record of a visit ({error}); move it away") from error
        for name, outcome in entries.items():
            if name not in found or found[name].date <= outcome.date:
                found[name] = outcome
    return found


def _outcome(entry: dict[str, Any]) -> Outcome:
    outcome = Outcome(**entry)
    for name, value in vars(outcome).items():
        if not isinstance(value, (int, float) if name == "seconds" else str):
            raise ValueError(f"{name} is {value!r}")
    return outcome


def facts(path: Path) -> dict[str, object]:
    """Return what a record that can be read says besides the pieces."""
    return {key: value for key, value in json.loads(read_text(path)).items() if key != "pieces"}


def write(path: Path, state: Mapping[str, Outcome], facts: Mapping[str, object]) -> None:
    """Write the record completely or not at all."""
    write_json(path, {**facts, "pieces": {name: asdict(outcome) for name, outcome in state.items()}})


def is_done(piece: Piece, state: Mapping[str, Outcome]) -> bool:
    """Return True if the piece passed or had nothing to run, with the same inputs, after the piece it builds on."""
    outcome, before = state.get(piece.name), state.get(piece.after)
    if outcome is None or (before is not None and before.date > outcome.date):
        return False
    return outcome.status in FINAL and outcome.inputs == digest(piece)


def left_out(todo: Iterable[Piece], state: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Return the families of kernels that did not pass their last trial, with its outcome."""
    tried = {piece.family: state[piece.name] for piece in todo if piece.family and piece.name in state}
    return {family: outcome for family, outcome in tried.items() if outcome.status not in FINAL}


def worst(state: Mapping[str, Outcome], todo: Iterable[Piece]) -> int:
    """Return the exit status of a visit: 0 if every piece passed or had nothing to run, else 1."""
    return 0 if all(piece.name in state and state[piece.name].status in FINAL for piece in todo) else 1


def pack(folder: Path, archive: Path, largest: int = LARGEST_ARCHIVE) -> list[str]:
    """Write the files in ``folder`` into one archive, completely or not at all. Return the names that did not fit.

    Rows and tables come first, then logs (only the end of long ones), then compilers' caches. The archive also lists
    the missing names, in ``left_out.txt``.
    """
    missing: list[str] = []
    room = int(largest * 0.97)
    archive.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(archive) as temporary, tarfile.open(temporary, "w:gz", compresslevel=6) as tar:
        files = [path for path in folder.rglob("*") if path.is_file()]
        for kind, place in sorted((_rank(path, folder), path) for path in files):
            name = place.relative_to(folder.parent).as_posix()
            if kind == CACHES and missing:  # compressing the rest is not worth the time
                missing.append(name)
                continue
            try:
                content = place.read_bytes()
            except OSError:  # a compiler is still writing its cache; files that vanish are not needed
                continue
            if place.suffix == ".log":
                content = content[-LONGEST_LOG:]
            need = len(zlib.compress(content, 1)) + 1024
            if need > room:
                missing.append(name)
                continue
            room -= need
            _add(tar, name, content)
        if missing:
            _add(tar, f"{folder.name}/left_out.txt", "".join(f"{name}\n" for name in missing).encode())
    return missing


def _rank(path: Path, folder: Path) -> int:
    """Return a file's place in the order of packing."""
    parts = path.relative_to(folder).parts
    return {"logs": LOGS, "inductor": CACHES}.get(parts[0], FIRST) if len(parts) > 1 else FIRST


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
