"""``fastres photographs``: write eight photographs to try fastres on, from packages that bring them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastres.errors import OutputError
from fastres.files import written_whole
from fastres.terminal import wrote
from fastres.text import path_text

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = "photographs"
QUALITY = 90  # of the JPEG files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fastres photographs`` to ``parser``."""
    parser.add_argument("folder", nargs="?", default=FOLDER, metavar="FOLDER", help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    """Write the photographs that the folder does not have yet, and print their paths."""
    from fastres.extras import check_dependencies

    check_dependencies("photographs", ["skimage", "sklearn", "matplotlib"], "demo")
    folder = Path(options.folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in _pictures().items():
            path = folder / f"{name}.jpg"
            if not path.exists():
                with written_whole(path) as temporary:
                    picture().save(temporary, "jpeg", quality=QUALITY)
                wrote(path)
            print(path_text(path))
    except OSError as error:
        raise OutputError(
            f"The photographs cannot be written to {path_text(folder)!r}: {error.strerror or error}; use another folder"
        ) from error
    return 0


def _pictures() -> dict[str, Callable[[], Image]]:
    """Return, by name, a function for each photograph."""
    from matplotlib import cbook
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_image

    def portrait() -> Image.Image:
        with cbook.get_sample_data("grace_hopper.jpg") as file:  # type: ignore[union-attr]
            return Image.open(file).convert("RGB")

    return {
        "cat": lambda: Image.fromarray(data.chelsea()),
        "coffee": lambda: Image.fromarray(data.coffee()),
        "astronaut": lambda: Image.fromarray(data.astronaut()),
        "rocket": lambda: Image.fromarray(data.rocket()),
        "motorcycle": lambda: Image.fromarray(data.stereo_motorcycle()[0]),
        "flower": lambda: Image.fromarray(load_sample_image("flower.jpg")),
        "temple": lambda: Image.fromarray(load_sample_image("china.jpg")),
        "portrait": portrait,
    }
