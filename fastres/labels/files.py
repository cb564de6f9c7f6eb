"""Read files of labels: JSON, tables of names and labels, or one label a line."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastres.classification.walking import has_image_suffix
from fastres.errors import LabelError, near_matches
from fastres.files import read_text_input
from fastres.text import path_text

# Columns by their usual names, without case, spaces, '_' and '-'. Of several, the first in this order is used.
NAME_COLUMNS = (
    "path filepath imagepath imgpath file filename imagefile imagename image img imageid imgid key fname name id"
)
LABEL_COLUMNS = (
    "label labels class cls target category labelid classid classindex labelindex classname labelname categoryname y"
)
ACCEPTED = "lines of 'name,label' (with a header if there are more columns), one label a line, or JSON"
FOLDERS = "folders"  # labels that are in no file, but the names of folders
_ONE_LABEL = ("label", "labels", "class", "target")  # a header above one label a line


@dataclass(frozen=True)
class LabelFile:
    """The labels in a file: in the order of the images (``ordered``), or by name (``named``, with repetitions)."""

    ordered: list[Any] | None
    named: list[tuple[str, Any]] | None
    text: str


def read_labels(path: str | os.PathLike[str], label_column: str | None = None) -> LabelFile:
    """Return the labels in the file ``path``; ``label_column`` is the column of a table with a header.

    Raises ``LabelError`` if the file cannot be read or holds no labels.
    """
    shown = repr(path_text(path))
    try:
        text = read_text_input(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LabelError(f"labels: {shown} cannot be read ({reason}); give a file in UTF-8") from error
    if text.lstrip()[:1] in ("[", "{"):
        if label_column is not None:
            raise LabelError(f"label_column is {label_column!r}, but {shown} is JSON, which has no columns")
        return _json(text, shown)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise LabelError(f"labels: {shown} is empty; give {ACCEPTED}")
    return _table(lines, shown, label_column)


def _json(text: str, shown: str) -> LabelFile:
    try:
        # Pairs instead of dicts, so that a name that occurs twice is not lost.
        content = json.loads(text, object_pairs_hook=lambda pairs: _Pairs(pairs))
    except (ValueError, RecursionError) as error:
        raise LabelError(f"labels: {shown} is not JSON ({error})") from error
    if isinstance(content, _Pairs):
        return LabelFile(None, list(content), shown)
    return LabelFile(list(content), None, shown)


class _Pairs(tuple[tuple[str, Any], ...]):
    """The items of an object in JSON."""

    def __repr__(self) -> str:
        return repr(dict(self))


def _table(lines: Sequence[str], shown: str, label_column: str | None) -> LabelFile:
    separator = next((mark for mark in "\t,;" if mark in lines[0]), ",")
    try:
        rows = list(csv.reader(io.StringIO("\n".join(lines)), delimiter=separator, skipinitialspace=True))
    except csv.Error as error:
        raise LabelError(f"labels: {shown} cannot be read as a table ({error}); give {ACCEPTED}") from error
    rows = [[cell.strip() for cell in row] for row in rows]
    widths = set(map(len, rows))
    if widths == {1} and label_column is None:
        return _one_column([row[0] for row in rows], shown)
    if len(widths) > 1:
        odd = next(index for index, row in enumerate(rows) if len(row) != len(rows[0]))
        raise LabelError(
            f"labels: {shown} has lines with {', '.join(map(str, sorted(widths)))} columns: the first has "
            f"{len(rows[0])}, and {' '.join(rows[odd])[:80]!r} has {len(rows[odd])}; give {ACCEPTED}"
        )
    name, label, is_header = _columns(rows[0], shown, label_column)
    text = f"{shown}, columns {rows[0][name]!r} and {rows[0][label]!r}" if is_header else shown
    return LabelFile(None, [(row[name], row[label]) for row in rows[is_header:]], text)


def _one_column(cells: list[str], shown: str) -> LabelFile:
    """Return one label a line, or, if every line begins with the name of an image and a space, names and labels."""
    pairs = [re.fullmatch(r"(.*?\.\w+)\s+(\S.*)", cell) for cell in cells]
    named = [(match[1], match[2]) for match in pairs if match is not None and has_image_suffix(match[1])]
    if len(named) == len(cells):
        return LabelFile(None, [*named], shown)
    is_header = cells[0].lower() in _ONE_LABEL and cells[0] not in cells[1:] and len(cells) > 1
    return LabelFile([*cells[is_header:]], None, shown)


def _columns(first: list[str], shown: str, label_column: str | None) -> tuple[int, int, bool]:
    """Return the columns of names and labels, and whether the first row is a header."""
    plain = [re.sub(r"[\s_-]", "", cell).lower() for cell in first]
    names = [plain.index(name) for name in NAME_COLUMNS.split() if name in plain]
    labels = [plain.index(name) for name in LABEL_COLUMNS.split() if name in plain]
    if label_column is not None:
        if first.count(label_column) != 1:
            raise LabelError(
                f"labels: {shown} has no column {label_column!r} in its header ({', '.join(first)})."
                f"{near_matches(label_column, first)}"
            )
        labels = [first.index(label_column)]
    names = [name for name in names if name not in labels[:1]]
    if len(first) == 2:
        if any(map(has_image_suffix, first)) and label_column is None:
            return 0, 1, False
        name = names[0] if names else 1 - labels[0] if labels else 0
        return name, 1 - name, bool(names or labels)
    if names and labels:
        return names[0], labels[0], True
    missing = "a column of names ('path' or 'filename')" if labels else "a column of labels ('label' or 'class')"
    advice = "" if label_column is not None or labels else "; label_column names it"
    raise LabelError(
        f"labels: {shown} has lines with {len(first)} columns, and its first line ({', '.join(first)[:80]}) does not "
        f"name {missing}{advice}; give {ACCEPTED}"
    )
