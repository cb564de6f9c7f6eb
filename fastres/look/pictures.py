"""Write figures to disk, completely or not at all."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastres.errors import FastresError, MissingDependencyError
from fastres.extras import install
from fastres.files import refuse_unwritable, written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = (".png", ".jpg", ".pdf", ".svg")


def require_matplotlib() -> None:
    """Raise ``MissingDependencyError`` if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError(f"Figures need matplotlib, which is not installed: {install('look')}")


def checked_picture(path: str | os.PathLike[str], example: str = "picture.png") -> Path:
    """Return ``path`` if a picture can be written there. Call this before the work, not after it.

    Raises ``FastresError`` if the suffix is not in :data:`KINDS`, and the errors of
    :func:`~fastres.files.refuse_unwritable`.
    """
    path = Path(path)
    if path.suffix.lower() not in KINDS:
        raise FastresError(f"The picture cannot be {str(path)!r}; use a name that ends in {', '.join(KINDS)}")
    refuse_unwritable(path, example)
    return path


def save_picture(figure: Figure, path: Path, dpi: int) -> None:
    """Write ``figure`` to ``path``, completely or not at all. Raises ``FastresError`` if the file cannot be written."""
    try:
        with written_whole(path) as temporary:
            figure.savefig(temporary, dpi=dpi, format=path.suffix[1:])
    except OSError as error:
        raise FastresError(
            f"The picture {str(path)!r} cannot be written ({error.strerror}); use another path"
        ) from error
