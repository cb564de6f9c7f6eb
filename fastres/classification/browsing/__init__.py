"""A page to look through the results of ``fastres classify``: one HTML file with thumbnails by class and by doubt.

The page is made from a complete table alone: ``table`` reads it in batches, ``choosing`` takes the images that the page
shows, ``rereading`` makes their thumbnails, and ``page`` fills the templates. Its script is ``browse.js.jinja``.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastres.arguments import whole_number
from fastres.classification.report import Report
from fastres.classification.requests import HTML_PICTURES, Request
from fastres.errors import FastresError, ImageError, InputError, OutputError
from fastres.extras import check_dependencies
from fastres.files import refuse_inputs, refuse_unwritable, written_whole
from fastres.pages.words import count, significant
from fastres.storage.urls import is_url
from fastres.terminal import is_terminal
from fastres.text import path_text

SUFFIXES = (".html", ".htm")


@dataclass(frozen=True)
class PageReport:
    """A page that was written to ``html``.

    The table has ``rows``, and ``errors`` of them have an error. The page shows ``pictures`` images. ``unread`` of them
    could not be read again and have a reason instead of a thumbnail.
    """

    html: Path
    rows: int
    errors: int
    pictures: int
    unread: int

    def __str__(self) -> str:
        unread = f", {self.unread:,} of which could not be read again" if self.unread else ""
        shown = f"{self.pictures:,} of {count(self.rows, 'image')}{unread}"
        return f"{path_text(self.html)}: {shown}, {count(self.errors, 'error')}"


def browse(
    table: str | os.PathLike[str],
    html: str | os.PathLike[str] | None = None,
    *,
    pictures: int = HTML_PICTURES,
    image_column: str | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> PageReport:
    """Write a page to look through ``table``, which ``fastres.classify`` has written: Parquet, CSV or JSON Lines.

    The page is one file without links to others. It shows at most ``pictures`` images: of each class the most and the
    least certain ones, and those about which the model was most in doubt. It lists all classes, and the first errors.
    ``html`` is its path, which ends in ``.html``; the default is the name of the table with this suffix.

    The images are read again, under the names that the table has for them, so call this in the same folder as
    ``classify`` if they are relative. In place of an image that cannot be read, the page says why. ``image_column`` is
    that of ``classify``, and needed only for tables in CSV or JSON Lines.

    Raises ``InputError`` if the table has no classes or an argument is invalid, ``SourceError`` if the table cannot be
    read, ``OutputError`` if the page exists (unless ``overwrite``) or cannot be written, and
    ``MissingDependencyError``.

    >>> browse("photos.parquet", "photos.html", pictures=1000)
    """
    name = os.fspath(table)
    if html is None:
        if is_url(name):
            raise InputError(f"The table is {path_text(name)!r}; name the page as well (html, --html), a local file")
        html = Path(name).with_suffix(SUFFIXES[0])
    target = check_page(html, [name], overwrite, pictures)
    progress = is_terminal(sys.stderr) if progress is None else progress
    return _written(name, target, pictures, image_column, progress, {})


def check_page(html: str | os.PathLike[str], files: Iterable[str], overwrite: bool, pictures: int) -> Path:
    """Return the path of a page that is to be written. Call this before the work that it shows.

    Raises ``OutputError`` if it cannot be written, if it is or holds one of the ``files``, or exists (unless
    ``overwrite``), ``InputError`` if it is a URL, has another suffix, or the number of ``pictures`` is invalid, and
    ``MissingDependencyError`` without pyarrow.
    """
    check_dependencies("A page of results", ["pyarrow"])
    whole_number(pictures, "pictures")
    name = os.fspath(html)
    if is_url(name) or os.path.splitext(name)[1].lower() not in SUFFIXES:
        raise InputError(f"The page is {path_text(name)!r}; use a local file that ends in {' or '.join(SUFFIXES)}")
    page = Path(name)
    refuse_unwritable(page, "photos.html")
    refuse_inputs(page, [file for file in files if not is_url(file)])
    if page.exists() and not overwrite:
        raise OutputError(f"{name!r} already exists; use another name, or --overwrite to replace it")
    return page


def browse_report(report: Report, html: Path, pictures: int, request: Request, progress: bool) -> PageReport:
    """Write the page of the table that ``report`` is about, after a run of ``request``; see :func:`browse`."""
    known: dict[str, Any] = {"model": request.model_name}
    if report.resumed < report.rows:
        known["images_per_s"] = report.images_per_s
    return _written(os.fspath(report.output), html, pictures, request.image_column, progress, known)


def _written(
    name: str, html: Path, pictures: int, image_column: str | None, progress: bool, known: Mapping[str, Any]
) -> PageReport:
    """Write the page. ``known`` is what the caller knows of the run, for tables without a record."""
    from fastres.classification.remote import shown

    from .choosing import choose
    from .page import page, read_rows
    from .rereading import thumbnails
    from .table import ResultTable

    command = f"fastres classify --browse {shlex.quote(shown(name))} --html {shlex.quote(path_text(html))}"
    with _table_stays(command):
        table = ResultTable(name)
        chosen = choose(table, pictures, progress)
        rows = dict(read_rows(table, sorted({*chosen.pictures, *chosen.error_rows})))
        facts = {**known, **table.facts}
        column = image_column or facts.get("image_column")
        wanted = {row: rows[row].identity for row in chosen.pictures}
        found = thumbnails(table.kind, wanted, column if isinstance(column, str) else None, progress)
        more = f"{command} --html-pictures {10 * pictures} --overwrite"
        text = page(table.name, _facts(table.name, facts), chosen, rows, found, more)
        with written_whole(html) as temporary:
            temporary.write_text(text, encoding="utf-8")
    unread = sum(isinstance(picture, ImageError) for picture in found.values())
    return PageReport(html, chosen.images, chosen.errors, len(found), unread)


@contextmanager
def _table_stays(command: str) -> Iterator[None]:
    """If the block cannot write the page or is interrupted, say which ``command`` makes it."""
    try:
        yield
    except FastresError:
        raise
    except OSError as error:
        raise OutputError(
            f"The page cannot be written: {error.strerror or error}. The table is complete; fix the cause, then run: "
            f"{command} --overwrite"
        ) from error
    except KeyboardInterrupt as error:
        error.args = (f"interrupted: the page is not written, but the table is complete; run: {command}",)
        raise


def _facts(name: str, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what is known of the table and its run as names and values."""
    rate, source = facts.get("images_per_s"), facts.get("source")
    values = {
        "table": name,
        "model": facts.get("model"),
        "weights": facts.get("weights"),
        "images per second": significant(rate) if isinstance(rate, float) else None,
        "dtype": facts.get("dtype"),
        "decoder": facts.get("decoder"),
        "source": ", ".join(map(str, source)) if isinstance(source, list) else None,
        "fastres": facts.get("version"),
    }
    return [(said, str(value)) for said, value in values.items() if value not in (None, "")]
