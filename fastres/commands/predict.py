"""``fastres predict``: classify images, folders of images and standard input, and print the classes of each image."""

from __future__ import annotations

import argparse
import glob
import io
import itertools
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fastres.arguments import CATEGORIES_HELP, whole_number
from fastres.errors import ImageError, SourceError
from fastres.terminal import is_terminal, json_text, progress_bar, say
from fastres.text import path_text

if TYPE_CHECKING:
    from fastres.model.predict import Prediction

EXAMPLES = """examples:
  fastres predict cat.jpg dog.jpg
  fastres predict photos/ --json
  curl https://example.com/cat.jpg | fastres predict -
"""
STANDARD_INPUT = "-"
LARGEST_INPUT = 1 << 30  # bytes of an image that standard input may hold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastres predict`` to ``parser``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, folders, globs, or - for standard input")
    add("--model", default="resnet50", help="a name from 'fastres list' (default: %(default)s)")
    add("--weights", default="DEFAULT", help="an entry such as IMAGENET1K_V1, or the path of a checkpoint")
    add("--categories", metavar="FILE", help=CATEGORIES_HELP)
    add("--top-k", type=int, default=5, metavar="K", help="classes per image (default: %(default)s)")
    add("--batch-size", type=int, default=32, metavar="N", help="images per batch (default: %(default)s)")
    add("--device", default=None, help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--dtype", default="auto", help="float32, bfloat16, float16 (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the classes of each image as soon as its batch is done; return 1 if an image could not be read.

    An image that cannot be read has a line on standard error, and an ``error`` in JSON. The others do not suffer.
    """
    import torch

    from fastres.model.loading import load
    from fastres.model.predict import predict_each

    for name, value in (("--top-k", options.top_k), ("--batch-size", options.batch_size)):
        whole_number(value, name)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(options.model, options.weights, dtype=options.dtype, device=device, categories=options.categories)
    show = _show_json if options.json else _show
    failed = count = 0
    print("[" if options.json else "", end="")
    hidden = not is_terminal(sys.stderr) or is_terminal(sys.stdout)
    with progress_bar(desc="predict", unit="image", delay=1.0, disable=hidden) as bar:
        for name, found in predict_each(model, images(options.images), options.top_k, options.batch_size):
            if isinstance(found, ImageError):
                failed += 1
                bar.clear()
                say(f"fastres: {found}")
            show(name, found, first=not count)
            count += 1
            bar.update()
    print("\n]\n" if options.json else "", end="")
    return 1 if failed else 0


def _show(name: str, found: list[Prediction] | ImageError, first: bool) -> None:
    if not isinstance(found, ImageError):
        lines = [f"  {prediction.score:7.2%}  {prediction.label}" for prediction in found]
        print("\n".join([name, *lines]), flush=True)


def _show_json(name: str, found: list[Prediction] | ImageError, first: bool) -> None:
    row: dict[str, Any] = {"image": name, "predictions": []}
    if isinstance(found, ImageError):
        row["error"] = str(found)
    else:
        row["predictions"] = [
            {"label": p.label, "index": p.index, "score": p.score if math.isfinite(p.score) else None} for p in found
        ]
    print("\n" if first else ",\n", textwrap.indent(json_text(row), "  "), sep="", end="", flush=True)


def images(given: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield the name of each image with its path, its file, or the ``ImageError`` that says why there is none.

    ``given`` are files, folders, globs and ``"-"``. They are listed as ``fastres classify`` lists them.
    """
    read = False
    for name in given:
        if name == STANDARD_INPUT:
            yield name, ImageError("- was given twice; standard input holds one image") if read else _standard_input()
            read = True
        elif re.match(r"[a-z][a-z0-9+.-]+:/", name, re.IGNORECASE) and not os.path.lexists(name):
            yield (
                path_text(name),
                ImageError(
                    f"{name!r} is a URL. fastres does not download images; download it and pipe it in: "
                    "curl URL | fastres predict -"
                ),
            )
        elif os.path.isdir(name) or (glob.has_magic(name) and not os.path.lexists(name)):
            try:
                yield from _listed(name)
            except SourceError as error:
                yield path_text(name), ImageError(str(error))
        else:
            yield path_text(name), name


def _standard_input() -> Any:
    try:
        data = b"" if sys.stdin is None else sys.stdin.buffer.read(LARGEST_INPUT + 1)
    except (OSError, ValueError) as error:
        return ImageError(f"Standard input cannot be read ({error}); pipe an image file into it")
    if not data:
        return ImageError("Standard input is empty; pipe an image file into it")
    if len(data) > LARGEST_INPUT:
        return ImageError(f"Standard input has more than {LARGEST_INPUT:,} bytes; pipe one image file into it")
    file = io.BytesIO(data)
    file.name = "standard input"
    return file


def _listed(name: str) -> Iterator[tuple[str, Any]]:
    """Yield the images of a folder or a glob, in the order of ``fastres classify``."""
    from fastres.classification.globs import Glob
    from fastres.classification.walking import Walk, error_entry, file_entry

    entries: Iterator[dict[str, Any]]
    if os.path.isdir(name):
        walk = Walk()
        entries = itertools.chain(walk.folder(name), walk.links())
    else:
        entries = (
            file_entry(path) if error is None else error_entry(path, error)
            for path, error in Glob(name).matches().items()
        )
    empty = True
    for entry in entries:
        empty = False
        path = os.fsdecode(entry["path"])
        yield path_text(path), ImageError(f"{path_text(path)!r}: {entry['error']}") if entry.get("error") else path
    if empty:
        found = "There are no images in" if os.path.isdir(name) else "No file matches"
        raise SourceError(f"{found} {path_text(name)!r}; pass a folder with images, or their files")
