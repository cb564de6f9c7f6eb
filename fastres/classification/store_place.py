"""An output in an object store, whose work folder is a prefix there.

An object appears when it is complete, so nothing needs to be renamed. The output is uploaded in parts, which become an
object in one step. The manifest beside it comes last.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fastres.errors import OutputError, StorageError
from fastres.storage import objects
from fastres.storage.urls import (
    GS,
    NOT_LISTED,
    S3,
    as_folder,
    bucket_of,
    checked,
    is_url,
    joined,
    protocol_of,
    url_text,
)
from fastres.terminal import warn

from .folder import MANIFEST, is_own
from .formats import check_output_name
from .listing import writing_list
from .places import Place

_BLOCK = 1 << 24  # bytes of a list of images that are copied at once


class StorePlace(Place):
    """The place of the output ``url``."""

    def __init__(self, url: str) -> None:
        self._url = checked(url)
        self._folder = f"{self._url}.partial/"
        self.output = self.path = url_text(self._url)
        self.folder = url_text(self._folder)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        check_output_name(self.output)
        protocol = protocol_of(self._url)
        if protocol in NOT_LISTED:
            raise OutputError(
                f"The output {self.output!r} is on a web server; use a path, or an object store such as s3:// or gs://"
            )
        if protocol in (*S3, *GS) and bucket_of(self._url) == self._url.partition("://")[2]:
            raise OutputError(
                f"The output {self.output!r} is a bucket; write bucket and name, such as "
                f"'{protocol}://bucket/photos.parquet'"
            )

    def absolute(self) -> StorePlace:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_scratch": None}

    @contextmanager
    def opened(self) -> Iterator[None]:
        foreign = [name for name in self.names() if not is_own(name)]
        if foreign:
            raise OutputError(
                f"{self.folder!r}, where fastres keeps finished rows, holds {foreign[0]!r}, which fastres has not "
                "written; move it away, or use another output"
            )
        try:
            yield
        finally:
            if self._scratch is not None:
                self._scratch.cleanup()
                self._scratch = None

    def refuse_inputs(self, inputs: Iterable[str]) -> None:
        for given in filter(is_url, inputs):
            if given == self._url or as_folder(given).startswith(self._folder):
                name = url_text(given)
                raise OutputError(
                    f"The output {self.output!r} is the input {name!r}, which would be lost; use another output"
                )

    def names(self) -> list[str]:
        return objects.names(self._folder)

    def read(self, name: str) -> bytes:
        return self._read(joined(self._folder, name))

    def write(self, name: str, content: bytes) -> None:
        objects.write(joined(self._folder, name), content)

    def delete(self, names: Iterable[str]) -> None:
        objects.delete([joined(self._folder, name) for name in names])

    def write_first(self, name: str, content: bytes) -> None:
        if objects.info(joined(self._folder, name)) is None:
            self.write(name, content)

    @contextmanager
    def new_listing(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="fastres-") as folder:
            yield Path(folder, "listing.jsonl")

    def publish(self, path: Path, name: str) -> None:
        with path.open("rb") as file, objects.open_output(joined(self._folder, name)) as target:
            while block := file.read(_BLOCK):
                target.write(block)

    def listing(self, name: str) -> Path:
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="fastres-")
        path = Path(self._scratch.name, name)
        if not path.exists():
            url = joined(self._folder, name)
            with writing_list(path) as file, objects.open_input(url) as source:
                while block := source.read(_BLOCK):
                    file.write(block)
        return path

    def output_size(self) -> int | None:
        found = objects.info(self._url)
        return None if found is None else found.size

    def output_blocks(self) -> Iterator[bytes]:
        with suppress(objects.MissingObject), objects.open_input(self._url) as file:
            while block := file.read(_BLOCK):
                yield block

    def writing_output(self) -> AbstractContextManager[IO[bytes]]:
        return objects.open_output(self._url)

    def write_sidecar(self, content: bytes) -> None:
        objects.write(self._sidecar, content)

    def read_sidecar(self) -> bytes:
        return self._read(self._sidecar)

    def delete_sidecar(self) -> None:
        objects.delete([self._sidecar])

    @property
    def _sidecar(self) -> str:
        return f"{self._url}{self.sidecar[len(self.output) :]}"

    def discard(self) -> None:
        self._delete_all()

    def remove(self) -> None:
        try:
            foreign = self._delete_all()
        except StorageError as error:
            warn(f"{self.folder!r} is left behind: {error}", UserWarning)
            return
        if foreign:
            warn(
                f"{self.folder!r} is left behind, because it holds {foreign[0]!r}, which fastres has not written",
                UserWarning,
            )

    def _delete_all(self) -> list[str]:
        """Delete what is fastres's, the manifest last; return the names of the rest."""
        names = self.names()
        own = [name for name in names if is_own(name) and name != MANIFEST]
        objects.delete([joined(self._folder, name) for name in own])
        objects.delete([joined(self._folder, MANIFEST)])
        return [name for name in names if not is_own(name)]

    def _read(self, url: str) -> bytes:
        content = objects.read_many([(url, 0, 1 << 40)])[0]
        if isinstance(content, objects.MissingObject):
            raise FileNotFoundError(2, os.strerror(2), url_text(url)) from content
        if isinstance(content, Exception):
            raise content
        return content
