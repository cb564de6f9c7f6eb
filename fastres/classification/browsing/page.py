"""The page of a table as HTML text: what the template ``browse.html.jinja`` shows."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastres.errors import ImageError
from fastres.pages.templates import rendered

from .choosing import Chosen
from .rereading import Identity
from .table import TYPES, ResultTable

FOLDER = Path(__file__).parent
CLASSES = 1000  # in the list of classes


@dataclass(frozen=True)
class Row:
    """A row of the table: its image, and either its classes or its error."""

    identity: Identity
    error: str | None
    label: str | None
    score: float | None
    second_label: str | None
    second_score: float | None

    @property
    def name(self) -> str:
        """The image's name: its path, and where it is inside of that."""
        path, key, row = self.identity
        if key is not None:
            return f"{path} › {key}"
        return path if row is None else f"{path} › row {row:,}"


def read_rows(table: ResultTable, wanted: Sequence[int]) -> Iterator[tuple[int, Row]]:
    """Yield the rows of ``table`` with the numbers ``wanted``, which are in order. Raises ``SourceError``."""
    start, numbers = 0, np.array(wanted, np.int64)
    for batch in table.batches(list(TYPES)):
        inside = numbers[(numbers >= start) & (numbers < start + batch.num_rows)]
        for number, row in zip(inside.tolist(), batch.take(pa.array(inside - start)).to_pylist(), strict=True):
            identity = Identity(row["path"] or "", row.get("key"), row.get("row"))
            first, second = (row["label_1"], row["score_1"]), (row.get("label_2"), row.get("score_2"))
            yield number, Row(identity, row["error"], *first, *second)
        start += batch.num_rows


def page(
    title: str,
    facts: Sequence[tuple[str, str]],
    chosen: Chosen,
    rows: Mapping[int, Row],
    pictures: Mapping[int, str | ImageError],
    again: str,
) -> str:
    """Return the page. ``again`` is the command that makes it once more.

    ``rows`` are those that it shows, ``pictures`` their thumbnails as data URIs, or why there is none.
    """
    script = (FOLDER / "browse.js.jinja").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = chosen.pictures
    groups = [each for each in chosen.classes if each.shown]
    values: dict[str, Any] = {
        "title": title,
        "facts": facts,
        "chosen": chosen,
        "rows": rows,
        "pictures": pictures,
        "shown": len(shown),
        "unread": sum(isinstance(pictures[row], ImageError) for row in shown),
        "sound": chosen.images - chosen.errors,
        "groups": groups,
        "classes": chosen.classes[:CLASSES],
        "again": again,
        "script": script,
        "digest": digest,
        "is_picture": lambda found: isinstance(found, str),
    }
    return rendered(FOLDER, "browse.html.jinja", **values)
