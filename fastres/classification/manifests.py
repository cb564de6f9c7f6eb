"""The manifest of a run in shards: what all its processes must agree on."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from fastres.errors import OutputError, ResumeError
from fastres.version import __version__

from .formats import PARQUET
from .work import changes

_SHARED = "shards"  # marks the manifest of a run in shards; those of one process do not have it


@dataclass(frozen=True)
class Manifest:
    """The settings of a run and its list of images.

    ``settings`` determine the rows, as JSON values. ``fingerprint`` is the sha256 of the list of ``images`` images,
    made at the time ``listed`` (UTC). ``shards`` is how many shards the first process reckoned with, 0 if it cut them
    itself. ``schema`` is the Arrow schema of a Parquet output, ``None`` for CSV and JSON Lines. ``arguments`` are those
    of the command.
    """

    fastres: str
    settings: Mapping[str, Any]
    fingerprint: str
    batch_size: int
    images: int
    kind: str
    source: tuple[str, ...]
    image_column: str | None
    columns: tuple[str, ...]
    skipped: int
    listed: str
    shards: int
    schema: str | None
    arguments: Mapping[str, Any]

    @property
    def run(self) -> str:
        """The sha256 of what determines the rows."""
        facts = [self.fastres, self.settings, self.fingerprint, self.batch_size]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def listing(self) -> str:
        """The name of the file with the list of images."""
        return f"listing-{self.fingerprint}.jsonl"

    @property
    def metadata(self) -> dict[str, Any]:
        """What the output says about its run; the same as after a run in one process."""
        facts = {"source": list(self.source), "images": self.images, "listing": self.fingerprint}
        return {"version": self.fastres, **self.settings, **facts}

    @property
    def written(self) -> Any:
        """The columns of the output, as :func:`fastres.classification.formats.open_writer` wants them."""
        if self.schema is None:
            return self.settings["columns"]
        import pyarrow as pa

        try:
            return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(self.schema)))
        except pa.ArrowException as error:
            raise ValueError(f"its schema is damaged: {error}") from error

    def content(self) -> bytes:
        """Return the manifest as JSON."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    @classmethod
    def of(cls, document: Mapping[str, Any], folder: str) -> Manifest | None:
        """Return the manifest in ``document``, or ``None`` if it is empty or damaged.

        Raises ``OutputError`` if it is that of a run in one process, whose work folder is ``folder``.
        """
        if document and _SHARED not in document:
            raise OutputError(
                f"{folder!r} has rows of an interrupted run that has no shards; continue it in one process (--resume "
                "--processes 1), or delete the folder to start over"
            )
        try:
            given = {name: document[name] for name in cls.__dataclass_fields__}
            given |= {name: tuple(given[name]) for name in ("source", "columns")}
            manifest = cls(**given)
            _ = manifest.run
            if manifest.schema is None or find_spec("pyarrow") is not None:
                _ = manifest.written
        except (KeyError, TypeError, ValueError):
            return None
        return manifest


def encoded_schema(columns: Any) -> str | None:
    """Return the Arrow schema of a Parquet output as text for a manifest, or ``None`` for the names of columns."""
    return None if isinstance(columns, list) else base64.b64encode(columns.serialize().to_pybytes()).decode()


def refuse_earlier_form(manifest: Manifest, suffix: str, folder: str) -> None:
    """Raise ``ResumeError`` if the rows of a CSV or JSON Lines file are kept in Parquet files, as they once were."""
    if suffix != PARQUET and manifest.schema is not None:
        raise ResumeError(
            f"{folder!r} has rows of fastres {manifest.fastres} in an earlier form; join them with that version, or "
            "delete the folder to start over"
        )


def refuse_changes(manifest: Manifest, now: Mapping[str, Any], folder: str) -> None:
    """Raise ``ResumeError`` if this process would compute other rows than those of ``manifest``.

    ``now`` has its settings, its batch size and its source.
    """
    kept = (
        f"{folder!r} belongs to a run with other settings (use another output, or delete the folder to start over; "
        "options such as --dtype make different machines agree)"
    )
    before = {"source": list(manifest.source), **manifest.settings, "batch_size": manifest.batch_size}
    now = json.loads(json.dumps(now))
    if before != now:
        raise ResumeError(f"{kept}: {changes(before, now)}")
    if manifest.fastres != __version__:
        raise ResumeError(
            f"{folder!r} belongs to a run with fastres {manifest.fastres}, which may compute other values than "
            f"{__version__}, which is installed here; install the same version everywhere"
        )
