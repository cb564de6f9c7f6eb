"""What visits have found on a card so far, and the one file in which everything comes home."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from fastres.bench.report.results import write_whole
from fastres.errors import FastresError
from fastres.files import written_whole

from .pieces import Piece
from .running import FINAL, Outcome, digest

STATE, ARCHIVE = "visit.json", "gpu.tgz"
LARGEST_ARCHIVE = 16 * 10**6  # bytes: what a machine that is lent lets out as one file
LONGEST_LOG = 100_000  # bytes of a log that come home: its end
FIRST, LOGS, CACHES = range(3)

State = dict[str, Outcome]


def read(*paths: Path) -> State:
    """Outcomes by piece; of several records of one piece the latest. Raises ``FastresError`` for a damaged record."""
    found: State = {}
    for path in paths:
        if not path.is_file():
            continue
        try:
            entries = {name: Outcome(**entry) for name, entry in json.loads(path.read_text())["pieces"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise FastresError(f"{path} cannot be read as the record of a visit ({error}); move it away") from error
        for name, outcome in entries.items():
            if name not in found or found[name].date <= outcome.date:
                found[name] = outcome
    return found


def write(path: Path, state: Mapping[str, Outcome], facts: Mapping[str, object]) -> None:
    """Write the record whole or not at all."""
    document = {**facts, "pieces": {name: asdict(outcome) for name, outcome in state.items()}}
    write_whole(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def is_done(piece: Piece, state: Mapping[str, Outcome]) -> bool:
    """Whether the piece came to an end before, on the same inputs, and after what it builds on."""
    outcome, before = state.get(piece.name), state.get(piece.after)
    if outcome is None or (before is not None and before.date > outcome.date):
        return False
    return outcome.status in FINAL and outcome.inputs == digest(piece)


def left_out(todo: Iterable[Piece], state: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Families of kernels whose last trial did not pass, with how it ended."""
    tried = {piece.family: state[piece.name] for piece in todo if piece.family and piece.name in state}
    return {family: outcome for family, outcome in tried.items() if outcome.status not in FINAL}


def worst(state: Mapping[str, Outcome], todo: Iterable[Piece]) -> int:
    """Exit status of a visit: 0 where every piece passed or has nothing to run on, else 1."""
    return 0 if all(piece.name in state and state[piece.name].status in FINAL for piece in todo) else 1


def pack(folder: Path, archive: Path, largest: int = LARGEST_ARCHIVE) -> list[str]:
    """Write everything in ``folder`` into one archive, whole or not at all; what there was no room for.

    Rows and tables first, logs next (of long ones the end), compilers' caches last. What is left out is named in the
    archive as well, in ``left_out.txt``.
    """
    missing: list[str] = []
    room = int(largest * 0.97)
    archive.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(archive) as temporary, tarfile.open(temporary, "w:gz", compresslevel=6) as tar:
        files = [path for path in folder.rglob("*") if path.is_file()]
        for kind, place in sorted((_rank(path, folder), path) for path in files):
            name = place.relative_to(folder.parent).as_posix()
            if kind == CACHES and missing:  # compressing the rest of it would take longer than it is worth
                missing.append(name)
                continue
            try:
                content = place.read_bytes()
            except OSError:  # a compiler's cache is being written: nobody misses what vanishes
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
    """The order in which things are packed."""
    parts = path.relative_to(folder).parts
    return {"logs": LOGS, "inductor": CACHES}.get(parts[0], FIRST) if len(parts) > 1 else FIRST


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
