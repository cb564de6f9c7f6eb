"""The place of an output: on a file system or in an object store."""

from __future__ import annotations

import os
from pathlib import Path

from fastres.storage.urls import is_url

from .places import LocalPlace, Place
from .store_place import StorePlace


def place_of(output: str | os.PathLike[str], overwrite: bool = False) -> Place:
    """Return the place of ``output``, a path or a URL. With ``overwrite``, it replaces one that is there.

    Raises ``OutputError`` if it has none of the suffixes of tables, and ``InputError`` if the URL is incomplete or has
    a password.
    """
    place = StorePlace(str(output)) if is_url(output) else LocalPlace(Path(output))
    if overwrite:
        place.replace_output()
    return place
