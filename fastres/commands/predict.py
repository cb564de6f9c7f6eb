"""``fastres predict``: classify images, folders, URLs and standard input, and print the classes of each image."""

from __future__ import annotations

import argparse
import csv
import functools
import glob
import io
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fastres.arguments import CATEGORIES_HELP, MODEL_HELP, whole_number
from fastres.errors import ImageError, SourceError
from fastres.terminal import is_terminal, json_text, progress_bar, say
from fastres.text import path_text

if TYPE_CHECKING:
    from fastres.model.predictions import Predictions

EXAMPLES = """examples:
  fastres predict cat.jpg dog.jpg
  fastres predict photos/ 'more/**/*.png' --csv > classes.csv
  fastres predict https://example.com/cat.jpg --allow-urls
  fastres predict - < cat.jpg
"""
STANDARD_INPUT = "-"
LARGEST_INPUT = 1 << 30  # bytes of an image that standard input may hold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastres predict`` to ``parser``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, folders, globs, URLs, or - for standard input")
    add("--model", default="resnet50", help=MODEL_HELP)
    add("--weights", default="DEFAULT", help="an entry such as IMAGENET1K_V1, or the path of a checkpoint")
    add("--categories", metavar="FILE", help=CATEGORIES_HELP)
    add("--top-k", type=int, default=5, metavar="K", help="classes per image (default: %(default)s)")
    add("--batch-size", type=int, default=32, metavar="N", help="images per batch (default: %(default)s)")
    add("--device", default=None, help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--dtype", default="auto", help="float32, bfloat16, float16 (default: %(default)s)")
    add("--allow-urls", action="store_true", help="download the images whose URLs are given (http, https)")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="print JSON: a list with an object for each image")
    formats.add_argument("--csv", action="store_true", help="print CSV: a row for each image")


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
    show: Text | Json | Csv
    show = Json() if options.json else Csv(min(options.top_k, model.num_classes)) if options.csv else Text()
    failed = 0
    hidden = not is_terminal(sys.stderr) or is_terminal(sys.stdout)
    show.begin()
    with progress_bar(desc="predict", unit="image", delay=1.0, disable=hidden) as bar:
        given = images(options.images, options.allow_urls)
        for name, found in predict_each(model, given, options.top_k, options.batch_size):
            if isinstance(found, ImageError):
                failed += 1
                bar.clear()
                say(f"fastres: {found}")
            show.image(name, found)
            bar.update()
    show.end()
    return 1 if failed else 0


class Text:
    """Print a line for each class. An image that cannot be read has its line on standard error alone."""

    def begin(self) -> None:
        """Print nothing."""

    def image(self, name: str, found: Predictions | ImageError) -> None:
        if not isinstance(found, ImageError):
            lines = [f"  {prediction.score:7.2%}  {prediction.label}" for prediction in found]
            print("\n".join([name, *lines]), flush=True)

    def end(self) -> None:
        """Print nothing."""


class Json:
    """Print a JSON list, an object for each image as soon as it is known."""

    def __init__(self) -> None:
        self._separator = "\n"

    def begin(self) -> None:
        print("[", end="")

    def image(self, name: str, found: Predictions | ImageError) -> None:
        row = {"image": name, "predictions": []}
        row |= {"error": str(found)} if isinstance(found, ImageError) else {**found.to_dict(), "image": name}
        print(self._separator, textwrap.indent(json_text(row), "  "), sep="", end="", flush=True)
        self._separator = ",\n"

    def end(self) -> None:
        print("\n]")


class Csv:
    """Print a row for each image, with the columns of ``fastres classify``."""

    def __init__(self, top_k: int) -> None:
        self._columns = [f"{field}_{rank}" for rank in range(1, top_k + 1) for field in ("label", "index", "score")]
        self._writer = csv.writer(sys.stdout, lineterminator="\n")

    def begin(self) -> None:
        self._writer.writerow(["image", "error", *self._columns])

    def image(self, name: str, found: Predictions | ImageError) -> None:
        if isinstance(found, ImageError):
            self._writer.writerow([name, str(found), *("" for _ in self._columns)])
        else:
            values = (value for p in found for value in (p.label, p.index, p.score))
            self._writer.writerow([name, "", *values])
        sys.stdout.flush()

    def end(self) -> None:
        """Print nothing."""


def images(given: Iterable[str], allow_urls: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the name of each image with its path, its file, a function that returns its file, or an ``ImageError``.

    ``given`` are files, folders, globs, URLs and ``"-"``. They are listed as ``fastres classify`` lists them. URLs are
    downloaded if ``allow_urls``.
    """
    read = False
    for name in given:
        if name == STANDARD_INPUT:
            yield name, ImageError("- was given twice; standard input holds one image") if read else _standard_input()
            read = True
        elif re.match(r"[a-z][a-z0-9+.-]+:/", name, re.IGNORECASE) and not os.path.lexists(name):
            yield path_text(name), functools.partial(_from_url, name, allow_urls)
        elif os.path.isdir(name) or (glob.has_magic(name) and not os.path.lexists(name)):
            try:
                yield from _listed(name)
            except SourceError as error:
                yield path_text(name), ImageError(str(error))
        else:
            yield path_text(name), name


def _from_url(url: str, allowed: bool) -> io.BytesIO | ImageError:
    from .urls import fetched, is_url

    if not is_url(url):
        return ImageError(
            f"{url!r} is not a URL that predict downloads; give http:// or https://, or run 'fastres classify', which "
            "reads s3:// and gs://"
        )
    if not allowed:
        return ImageError(f"{url!r} is a URL; add --allow-urls to download it")
    try:
        return fetched(url)
    except ImageError as error:
        return error


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
