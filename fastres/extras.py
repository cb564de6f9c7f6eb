"""Optional packages: check that they are installed, and say how to install an extra of this very fastres."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from .errors import MissingDependencyError

_PROJECT = "pyproject.toml"
# Packages that are installed under another name than they are imported.
_PROJECTS = {"sklearn": "scikit-learn", "skimage": "scikit-image", "python_multipart": "python-multipart"}


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


def check_dependencies(what: str, packages: Sequence[str], extra: str = "classify", hint: str = "") -> None:
    """Raise ``MissingDependencyError`` if one of ``packages`` is not installed; ``what`` needs them from ``extra``.

    ``packages`` are names of modules. ``hint`` is a sentence about what else can be done.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        names = " and ".join(_PROJECTS.get(package, package) for package in missing)
        advice = f"{install(extra)}{'. ' if hint else ''}{hint}"
        raise MissingDependencyError(f"{what} needs packages that are not installed ({names}): {advice}")
