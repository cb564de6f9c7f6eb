"""Read the column of labels of Parquet files: numbers, texts, or Hugging Face's numbers with names."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Sequence
from functools import partial

import pyarrow as pa

from fastres.classification.copied import is_text, value_type
from fastres.classification.parquet import ParquetImages
from fastres.classification.parquet_rows import Cursor, OpenParquet
from fastres.classification.remote import shown
from fastres.errors import LabelError, near_matches
from fastres.images.classes import (
    AUTO,
    NUMBERS,
    Matched,
    known_names,
    match_classes,
    match_labels,
    may_be_imagenet,
    wordnet_ids,
)

from .collected import Collected

USUAL = ("labels", "cls", "class", "target")  # columns with labels, if there is only one of them and no ``label``
_AT_ONCE = 8192  # rows


class LabelColumn:
    """A column of labels. ``names`` are the names that Hugging Face's metadata have for its numbers, or ``None``.

    ``wanted`` is the name of the column; without it, the column is found. Raises ``LabelError`` if there is none, the
    files differ, or the column holds something else.
    """

    def __init__(self, images: ParquetImages, wanted: str | None) -> None:
        self._images = images
        sound = [os.fsdecode(entry["path"]) for entry in images.entries if entry["error"] is None]
        self.name = wanted if wanted is not None else _found(OpenParquet(sound[0])) if sound else USUAL[0]
        self.names: tuple[str, ...] | None = None
        first: OpenParquet | None = None
        for path in sound:
            file = OpenParquet(path)
            self._check(file)
            names = _class_names(file.schema, self.name)
            if first is not None and names != self.names:
                raise LabelError(
                    f"Column {self.name!r} has other class names in {_text(file.path)} than in {_text(first.path)}; "
                    "evaluate the files separately"
                )
            self.names, first = names, first or file

    def _check(self, file: OpenParquet) -> None:
        count = file.names.count(self.name)
        if count != 1:
            has = "no" if not count else "several"
            raise LabelError(
                f"{_text(file.path)} has {has} column{'s' * (count > 1)} {self.name!r}; it has "
                f"{', '.join(file.names)}.{near_matches(self.name, file.names)}"
            )
        kind = value_type(file.schema.field(self.name).type)
        if not (_is_number(kind) or is_text(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
            raise LabelError(
                f"Column {self.name!r} of {_text(file.path)} has type {kind}; labels are whole numbers or text. "
                "label_column names another column"
            )

    def labels(self) -> tuple[Collected, int]:
        """Return the labels, ints or texts, and how many rows have none because they are damaged.

        Raises ``LabelError``, which names file and row, for what is no label, and ``SourceError`` if a file has changed
        since it was listed.
        """
        collected, damaged, row = Collected(len(self._images)), 0, 0
        cursor = Cursor([self.name])
        for entry in self._images.entries:
            path, count = os.fsdecode(entry["path"]), entry["rows"]
            for start in range(0, count if entry["error"] is None else 0, _AT_ONCE):
                cursor.open(path).check_unchanged(entry["size"], entry["mtime_ns"])
                inside = start
                for part in cursor.rows(path, start, min(_AT_ONCE, count - start)):
                    if isinstance(part, tuple):
                        damaged += part[0]
                        inside += part[0]
                        continue
                    self._add(part.column(0), collected, row + inside, path, inside)
                    inside += part.num_rows
            row += count
        return collected, damaged

    def _add(self, array: pa.Array, collected: Collected, row: int, path: str, inside: int) -> None:
        for offset, value in enumerate(_decoded(array).to_pylist()):
            place = partial(self._place, path, inside + offset)
            if isinstance(value, bool):
                value = int(value)
            if value is None or value == "":
                raise LabelError(
                    f"{place()} is {'empty' if value == '' else 'null'}; every image needs a label. A test set without "
                    "labels cannot be used"
                )
            if not isinstance(value, (int, str)):
                raise LabelError(f"{place()} is {reprlib.repr(value)}; a label is a whole number or a text")
            if isinstance(value, int) and value < 0:
                raise LabelError(
                    f"{place()} is {value}, and class indices begin at 0; a negative number often marks images without "
                    "a label. A test set without labels cannot be used"
                )
            collected.set(row + offset, value, place)

    def _place(self, path: str, row: int) -> str:
        return f"Column {self.name!r} of {_text(path)}, row {row}"

    def match(self, places: dict[int | str, str], num_classes: int, categories: Sequence[str] | None, order: str,
              setting: str) -> tuple[Matched, bool]:  # fmt: skip
        """Return the class of each label, and whether the column's numbers are the model's class indices."""
        numbers = all(isinstance(label, int) for label in places)
        if self.names and numbers and order != NUMBERS:
            over = next((number for number in places if int(number) >= len(self.names)), None)
            if over is not None:
                raise LabelError(f"{places[over]} is {over}, but the file names only {len(self.names)} classes")
            matched = self._by_name(places, num_classes, categories, order, setting)
            if matched is not None:
                return matched, False
        matched = match_labels(
            places, num_classes, categories, order, setting=setting, digits_are_indices=False
        )  # digits in a column of text may be names, so text and numbers are told apart
        text = matched.text
        if self.names and numbers:
            shown = ", ".join(map(repr, self.names[:3]))
            text += f", and not by the class names in the file ({shown}{', …' * (len(self.names) > 3)})"
        return Matched(matched.index, matched.order, text), numbers

    def _by_name(self, places: dict[int | str, str], num_classes: int, categories: Sequence[str] | None, order: str,
                 setting: str) -> Matched | None:  # fmt: skip
        """Return the classes by the names in the file, or ``None`` if its numbers must be the class indices."""
        names = self.names or ()
        if order == AUTO:
            known = known_names(names, categories)
            agree = all(names.index(name) in indices for name, indices in known.items())
            sure = len(known) == len(names) and all(len(indices) == 1 for indices in known.values())
            if known and not agree and len(known) < len(names):
                other = next(name for name in names if name not in known)
                raise LabelError(
                    f"{len(known):,} of the {len(names):,} class names in the metadata of column {self.name!r} are "
                    f"names of the model's classes, but {other!r} is not; give {setting}='numbers' if the numbers in "
                    "the column are the model's class indices, or categories= with the names in the order of the "
                    "model's classes"
                )
            ids = not known and set(names) <= set(wordnet_ids()) and may_be_imagenet(num_classes, categories)
            if not ids and (not known or (agree and not sure)):
                return None
        matched = match_classes(names, num_classes, categories, order, noun="class name", setting=setting)
        index = {number: matched.index[names[int(number)]] for number in places}
        return Matched(index, matched.order, f"the numbers have names in the file: {matched.text}")


def _found(file: OpenParquet) -> str:
    """Return the column of labels by its usual names. Raises ``LabelError`` if there is none, or several."""
    if "label" in file.names:
        return "label"
    found = [name for name in USUAL if name in file.names]
    if len(found) == 1:
        return found[0]
    reason = f"several columns may hold labels ({', '.join(found)})" if found else "there is no column 'label'"
    raise LabelError(
        f"The labels in {_text(file.path)} cannot be found: {reason}. It has {', '.join(file.names)}; give one of them "
        "as label_column"
    )


def _class_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Return the names of the classes in Hugging Face's metadata, or ``None``; damaged metadata have none."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, IndexError, RecursionError):
        return None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        return None
    return tuple(names) if len(set(names)) == len(names) else None


def _decoded(array: pa.Array) -> pa.Array:
    while isinstance(array, pa.ExtensionArray) or pa.types.is_dictionary(array.type):
        array = array.storage if isinstance(array, pa.ExtensionArray) else array.dictionary_decode()
    return array


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _text(path: str) -> str:
    return repr(shown(path))
