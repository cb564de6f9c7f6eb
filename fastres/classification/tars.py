"""Read images from tar files in WebDataset's convention: files with the same name up to the first dot are one sample.

See https://github.com/webdataset/webdataset. The first image of a sample is classified; its other files are ignored.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from fastres.errors import ImageError, SourceError

from .listing import read_listing


def tar_entries(path: str, suffixes: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield one entry for each sample with an image: the position of its bytes in the tar.

    Raises ``SourceError`` if the file cannot be read or the image is a sparse file.
    """
    last = None
    try:
        facts = os.stat(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = split_name(member.name)
                if member.isreg() and os.path.splitext(f"x.{extension}")[1].lower() in suffixes and key != last:
                    if member.issparse():
                        raise SourceError(
                            f"{member.name!r} in {path!r} is a sparse file; write the tar without sparse files"
                        )
                    last = key
                    yield {
                        "path": os.fsencode(path),
                        "size": facts.st_size,
                        "mtime_ns": facts.st_mtime_ns,
                        "key": key.encode("utf-8", "backslashreplace").decode(),
                        "offset": member.offset_data,
                        "length": member.size,
                    }
                tar.members = []  # type: ignore[attr-defined] # otherwise it keeps every member in memory
    except (OSError, tarfile.TarError) as error:
        raise SourceError(f"{path!r} cannot be read as a tar file: {error}; write the file again") from error


def split_name(name: str) -> tuple[str, str]:
    """Split ``a/b.left.jpg`` into ``a/b``, the key of the sample, and ``left.jpg``, the file's name in the sample."""
    folder, base = posixpath.split(name)
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension


@dataclass(frozen=True)
class TarImages:
    """Image files in uncompressed tar files; ``listing`` is an Arrow file of their offsets."""

    listing: Path
    identity = pa.schema([("path", pa.string()), ("key", pa.string())])

    @cached_property
    def _table(self) -> pa.Table:
        return read_listing(self.listing)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"listing": self.listing}

    def read(self, start: int, stop: int) -> tuple[pa.RecordBatch, Iterator[str | bytes | ImageError]]:
        part = self._table.slice(start, stop - start)
        paths = part["path"].to_pylist()
        names = [path.decode("utf-8", "backslashreplace") for path in paths]
        arrays = [pa.array(names, pa.string()), part["key"].combine_chunks()]
        places = zip(paths, part["offset"].to_pylist(), part["length"].to_pylist(), strict=True)
        return pa.RecordBatch.from_arrays(arrays, schema=self.identity), _members(places)


def _members(places: Iterator[tuple[bytes, int, int]]) -> Iterator[bytes]:
    """Yield the bytes of each (tar, offset, length); a tar stays open until another one is needed."""
    name, file = None, None
    try:
        for path, offset, length in places:
            if path != name:
                if file is not None:
                    file.close()
                name, file = path, open(path, "rb", buffering=0)  # noqa: SIM115 - closed below
            assert file is not None
            data = os.pread(file.fileno(), length, offset)
            if len(data) != length:
                raise SourceError(
                    f"{os.fsdecode(path)!r} became shorter while it was being read; wait until it is completely written"
                )
            yield data
    except OSError as error:
        raise SourceError(
            f"{os.fsdecode(name or b'')!r} cannot be read: {error.strerror}; check that it still exists and is readable"
        ) from error
    finally:
        if file is not None:
            file.close()
