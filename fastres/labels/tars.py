"""Read labels from tars in WebDataset's convention: ``000.cls`` beside ``000.jpg`` holds a class index or a name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby

from fastres.classification.listing import Entry
from fastres.classification.remote import shown
from fastres.classification.tars import tar_texts
from fastres.errors import LabelError
from fastres.storage.urls import is_url
from fastres.text import path_text

from .collected import Collected

EXTENSION = "cls"
_MOST = 1024  # bytes of a label


def tar_labels(entries: Iterable[Entry], count: int, extension: str) -> tuple[Collected, int]:
    """Return the label of each sample, as text, and how many samples have none because their tar is damaged.

    ``extension`` is the name of the member with the label in a sample. Raises ``LabelError``, which names tar and key,
    if a sample has no label or several, or if a label is no text; ``SourceError`` if a tar has changed since it was
    listed.
    """
    collected, damaged = Collected(count), 0
    numbered = enumerate(entries)
    for _, rows in groupby(numbered, key=lambda item: item[1]["path"]):
        damaged += _add_tar(list(rows), collected, extension)
    return collected, damaged


def _add_tar(rows: list[tuple[int, Entry]], collected: Collected, extension: str) -> int:
    sound = [(row, entry) for row, entry in rows if entry["error"] is None]
    if not sound:
        return 0
    path = shown(sound[0][1]["path"])
    texts: dict[str, list[bytes | None]] = {}
    is_damaged, lost = False, 0
    for item in tar_texts(sound[0][1], extension, _MOST + 1):
        if item is None:
            is_damaged = True
        else:
            texts.setdefault(item[0], []).append(item[1])
    samples: dict[str, int] = {}
    for _, entry in rows:
        if entry["key"] is not None:
            samples[entry["key"]] = samples.get(entry["key"], 0) + 1
    taken: dict[str, int] = {}
    for row, entry in rows:
        key = entry["key"]
        if key is None:
            continue
        number = taken[key] = taken.get(key, -1) + 1
        found = _chosen(texts.get(key, []), number, samples[key])
        place = partial(_place, path, key, extension)
        if found is not None and (found[0] is not None or not is_damaged):
            collected.set(row, _label(found[0], place), place)
        elif entry["error"] is not None:
            continue
        elif is_damaged:
            lost += 1
        else:
            several = f"{len(texts[key])} files {key}.{extension} for {samples[key]} images" if key in texts else ""
            raise LabelError(
                f"Sample {key!r} of {path!r} has {several or f'no file {key}.{extension}'}; every image needs one "
                "label. label_column names another member, or give labels= with a file"
            )
    return lost


def _chosen(texts: list[bytes | None], number: int, samples: int) -> tuple[bytes | None] | None:
    """Return the label of sample ``number`` of those with the same key, in a tuple, or ``None`` if it is not clear."""
    if len(texts) == samples:
        return (texts[number],)
    return (texts[0],) if samples == 1 and len(set(texts)) == 1 else None


def _label(data: bytes | None, place: partial[str]) -> str:
    if data is None:
        raise LabelError(f"{place()} cannot be read; write the tar again")
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        text = ""
    if not text or len(data) > _MOST or "\n" in text:
        raise LabelError(f"{place()} is {data[:40]!r}; a label is a class index or the name of a class, in one line")
    return text


def _place(path: str, key: str, extension: str) -> str:
    return f"{key}.{extension} in {path!r}"


def tar_names(entries: Iterable[Entry]) -> Iterator[tuple[str | None, bool]]:
    """Yield, for each entry, ``tar path/key`` (``None`` for what is damaged), and whether the image can be read."""
    for entry in entries:
        key, path = entry["key"], os.fsdecode(entry["path"])
        text = shown(path) if is_url(path) else path_text(os.path.abspath(path))
        yield (None if key is None else f"{text}/{key}"), entry["error"] is None
