"""The packages that ``fastres.ray`` needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from fastres.errors import MissingDependencyError


def needs(what: str, packages: Sequence[str]) -> None:
    """Raise ``MissingDependencyError`` if one of ``packages`` is not installed; ``what`` needs them."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f"{what} needs packages that are not installed ({' and '.join(missing)}): pip install 'fastres[ray]'"
        )
