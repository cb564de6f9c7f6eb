"""Join the parts of a run in shards into its output: the table that one process would write, byte for byte."""

from __future__ import annotations

import hashlib
import json
import time
from datetime import datetime, timezone
from typing import IO, Any

from fastres.errors import OutputError, ResumeError, ResumeWarning
from fastres.terminal import progress_bar, warn

from . import parts
from .formats import open_writer
from .manifests import Manifest, refuse_earlier_form
from .places import Place
from .report import Report
from .shards import described, numbers_of
from .shared import RunFinishedError, finished_run, report_of, unless_finished


def join(place: Place, *, progress: bool) -> Report:
    """Write the output of the run in ``place``, and delete the work folder.

    If the output is already that of a run in shards and there is no work folder, report it. Raises ``ResumeError`` if
    rows are missing, and ``OutputError`` if there is no run, if the output exists (unless it is replaced, or is what
    would be written), or if it cannot be written.
    """
    began = time.monotonic()
    manifest, finished = Manifest.of(place.manifest(), place.folder), place.finished()
    if manifest is None:
        if finished:
            return report_of(place, finished, time.monotonic() - began)
        raise OutputError(
            f"{place.folder!r} has no run in shards to join; begin one with: fastres classify SOURCE -o "
            f"{place.output} --shard 1/4"
        )
    refuse_earlier_form(manifest, place.suffix, place.folder)
    try:
        with unless_finished(place, manifest.run), place.opened():
            document = _joined(place, manifest, progress)
    except RunFinishedError as done:  # another process has joined them in the meantime
        document = done.manifest
    return report_of(place, document, time.monotonic() - began)


def _joined(place: Place, manifest: Manifest, progress: bool) -> dict[str, Any]:
    """Write output and manifest; return the manifest."""
    damaged: list[parts.Part] = []
    while True:
        named = [part for part in parts.named_parts(place.names()) if part not in damaged]
        slices, missing = parts.cover(named, range(manifest.images))
        if missing:
            raise _incomplete(place, manifest, missing, damaged)
        try:
            with place.writing_output() as file:
                target = _Measured(file)
                errors = _write(target, place, manifest, slices, progress)
                _refuse_other_output(place, target)
                if not finished_run(place, manifest.run):
                    place.delete_sidecar()  # it must never describe another output
            break
        except parts.DamagedPartError as error:
            damaged.append(error.part)
    if damaged:
        names = ", ".join(part.name for part in damaged[:3])
        warn(
            f"damaged parts in {place.folder!r} were not used, because others have the same rows: {names}",
            ResumeWarning,
        )
    document = {
        "fastres": manifest.fastres,
        "run": manifest.run,
        "output": place.output,
        "bytes": target.size,
        "sha256": target.digest.hexdigest(),
        "images": manifest.images,
        "errors": errors,
        "skipped": manifest.skipped,
        "listed": manifest.listed,
        "finished": datetime.now(timezone.utc).isoformat(" ", "seconds"),
        "source": list(manifest.source),
        "listing": manifest.fingerprint,
        "batch_size": manifest.batch_size,
        "settings": dict(manifest.settings),
        "arguments": dict(manifest.arguments),
    }
    place.write_sidecar((json.dumps(document, indent=1) + "\n").encode())
    place.remove()
    return document


def _write(target: _Measured, place: Place, manifest: Manifest, slices: list[parts.Slice], progress: bool) -> int:
    """Write the rows; return how many have an error."""
    errors = 0
    with (
        open_writer(target, place.suffix, manifest.written, manifest.metadata) as writer,  # type: ignore[arg-type]
        progress_bar(
            total=manifest.images, desc="Writing the table", unit="row", delay=1.0, disable=not progress
        ) as bar,
    ):
        for rows in parts.merged(slices, manifest.run, place.read):
            writer.write_table(rows)
            errors += len(parts.failed(rows))
            bar.update(rows.num_rows)
    return errors


def _refuse_other_output(place: Place, target: _Measured) -> None:
    """Raise ``OutputError`` if an output exists that is not the one that has been written to ``target``."""
    if place.replaces or place.output_size() is None:
        return
    digest = hashlib.sha256()
    for block in place.output_blocks():
        digest.update(block)
    if digest.digest() != target.digest.digest():
        raise OutputError(
            f"{place.output!r} already exists and is another table; use --overwrite to replace it. The rows of the "
            f"shards stay in {place.folder!r}"
        )


def _incomplete(place: Place, manifest: Manifest, missing: list[range], damaged: list[parts.Part]) -> ResumeError:
    rows = sum(len(gap) for gap in missing)
    text = f"{rows:,} of {manifest.images:,} rows of {place.output!r} are missing: {described(missing)}"
    if damaged:
        text += f" ({len(damaged):,} parts are damaged: {', '.join(part.name for part in damaged[:3])})"
    if manifest.shards:
        shards = [str(shard) for shard in numbers_of(missing, manifest.shards, manifest.images, manifest.batch_size)]
        more = f" and {len(shards) - 10:,} more" if len(shards) > 10 else ""
        text += f". Run these shards again: --shard {', '.join(shards[:10])}{more}"
    return ResumeError(f"{text}. Rows that are finished stay in {place.folder!r}")


class _Measured:
    """A file that counts and hashes what is written to it."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        block = bytes(data)
        self._file.write(block)
        self.digest.update(block)
        self.size += len(block)
        return len(block)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self.size

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        pass
