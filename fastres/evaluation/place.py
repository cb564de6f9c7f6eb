"""The folder of an evaluation: checked before the work, created for it, and what an interruption there leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastres.classification.listing import FILES
from fastres.classification.sources import Found
from fastres.classification.work import check_output, work_folder
from fastres.errors import OutputError
from fastres.files import other_kind
from fastres.storage.urls import is_url
from fastres.text import article

TABLE, DOCUMENT, REPORT = "images.parquet", "evaluation.json", "report.html"


def parse_folder(output: Any) -> Path | None:
    """Return ``output`` as a path. Raises ``OutputError`` if it is no path, or empty, like a shell's unset variable."""
    if output is None:
        return None
    if not isinstance(output, (str, os.PathLike)):
        raise OutputError(f"The output is {article(output)}; pass the name of a folder")
    if not os.fspath(output):
        raise OutputError("The output is empty; pass the name of a folder, such as '.' for the current one")
    return Path(output)


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise ``OutputError`` if ``folder`` cannot take the files of an evaluation, or has some already."""
    try:
        kind = other_kind(folder.stat().st_mode)
    except FileNotFoundError:
        if not folder.parent.is_dir():
            raise OutputError(
                f"The output's folder {str(folder.parent)!r} does not exist; create it, or use another output"
            ) from None
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"The output {str(folder)!r} cannot be written ({reason}); use another path") from error
    if kind != "a folder":
        raise OutputError(f"The output {str(folder)!r} is {kind or 'a file'}; pass the name of a folder")
    there = [name for name in (TABLE, DOCUMENT, REPORT) if (folder / name).exists()]
    begun = (folder / TABLE).exists() or work_folder(folder / TABLE).exists()
    if there and not (overwrite or (resume and begun)):
        advice = ", --resume to go on with the same evaluation," if begun else ""
        raise OutputError(
            f"{str(folder)!r} already has {' and '.join(there)}; use another output{advice} or --overwrite to replace "
            f"{'it' if len(there) == 1 else 'them'}"
        )
    if not (folder / TABLE).exists():
        check_output(folder / TABLE, resume, overwrite)  # an interrupted run


def refuse_class_folders(folder: Path, found: Found) -> None:
    """Raise ``OutputError`` if ``folder`` would be, or hold, a class folder of a source whose folders are classes."""
    places = {os.path.realpath(folder), os.path.realpath(folder.parent)}
    for part in found.parts:
        if found.kind == FILES and not part.matched and not is_url(part.path) and os.path.realpath(part.path) in places:
            raise OutputError(
                f"The output {str(folder)!r} is in the source {part.path!r}, whose folders are classes; use an output "
                "outside it"
            )


@contextmanager
def created(folder: Path) -> Iterator[None]:
    """Create ``folder``; if the block raises and it is still empty, delete it. Raises ``OutputError``."""
    existed = folder.exists()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The output {str(folder)!r} cannot be created ({error.strerror}); use another path"
        ) from error
    try:
        yield
    except BaseException:
        if not existed:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


@contextmanager
def complete_table(images: int, is_temporary: bool) -> Iterator[None]:
    """Say in an interruption of the block that the table is complete, unless it is deleted afterwards."""
    try:
        yield
    except KeyboardInterrupt as error:
        if not is_temporary:
            error.args = (f"interrupted: the table of {images:,} rows is complete; --resume writes the report",)
        raise


def remove_earlier(folder: Path) -> None:
    """Delete the report and the figures of an earlier evaluation, whose table was replaced. Raises ``OutputError``."""
    try:
        for name in (DOCUMENT, REPORT):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{error.filename!r}, of an earlier evaluation, cannot be deleted ({error.strerror}); delete it, and run "
            "the command again with --resume"
        ) from error
