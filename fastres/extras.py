"""How to install an extra of this installation of fastres: from a checkout, or from the package index."""

from __future__ import annotations

import importlib.metadata
import json
import os
import urllib.parse
import urllib.request
from pathlib import Path

_PROJECT = "pyproject.toml"


def install(extra: str) -> str:
    """Return the command that installs the optional packages of ``extra`` for the fastres that is running.

    In a checkout, and for a fastres that was installed from a folder, the command names that folder.
    """
    editable, folder = _origin()
    if folder is None:
        return f"pip install 'fastres[{extra}]'"
    place = "." if os.path.realpath(folder) == os.path.realpath(os.curdir) else str(folder)
    return f"pip install {'-e ' if editable else ''}'{place}[{extra}]'"


def _origin() -> tuple[bool, Path | None]:
    """Return the folder of the project's sources, or ``None``, and whether fastres runs from it."""
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / _PROJECT).is_file():
        return True, checkout
    try:
        text = importlib.metadata.distribution("fastres").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return False, None
    url = urllib.parse.urlsplit(json.loads(text).get("url", "") if text else "")
    folder = Path(urllib.request.url2pathname(url.path))
    return False, folder if url.scheme == "file" and (folder / _PROJECT).is_file() else None
