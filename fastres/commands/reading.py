"""Options of the commands that read many images: how they are read, and where the network runs."""

from __future__ import annotations

import argparse


def add_reading(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the options to ``parser``; ``output`` is what copied columns go to."""
    add = parser.add_argument
    add("--batch-size", type=int, metavar="N", help="images per batch (default: 16, 128 on a GPU)")
    add("--workers", type=int, metavar="N", help="processes that decode images (default: one per core, up to 16)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--image-column", metavar="NAME", help="Parquet: column of images (default: 'image', or the only binary one)")
    add("--columns", nargs="+", default=[], metavar="NAME", help=f"Parquet: columns to copy to the {output}")
