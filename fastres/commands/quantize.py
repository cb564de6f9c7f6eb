"""``fastres quantize``: the command line of :func:`fastres.quantize`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastres.arguments import CATEGORIES_HELP
from fastres.files import refuse_inputs, refuse_unwritable
from fastres.terminal import json_text, wrote
from fastres.text import path_text

EXAMPLES = """examples:
  fastres quantize resnet50 photos/ -o resnet50.int8.safetensors
  fastres quantize resnet50 shards/*.tar -o resnet50.int8.safetensors --samples 1024
  fastres quantize resnet18 photos/ --weights trained.pth --labels-from-folders -o resnet18.int8.safetensors
  fastres quantize resnet50 photos/ -o resnet50.int8.safetensors --largest-error 0.05
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastres quantize`` to ``parser``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("model", metavar="MODEL", help="a name from 'fastres list', a saved folder or a hub id")
    add("images", nargs="+", metavar="IMAGES", help="folder, glob, tar files (WebDataset) or Parquet files")
    add("-o", "--output", required=True, type=Path, help="file to write: .safetensors")
    add("--weights", default="DEFAULT", help="an entry such as IMAGENET1K_V1, or the path of a checkpoint")
    add("--categories", metavar="FILE", help=CATEGORIES_HELP)
    add("--method", default="auto", help="auto (default), max, percentile, percentile-99.9, mse or entropy")
    add("--keep", nargs="+", default=[], metavar="STEP", help="steps to compute in float32")
    add("--largest-error", type=float, metavar="E", help="keep sensitive steps in float32 until the error is at most E")
    add("--samples", type=int, default=512, metavar="N", help="images to use (default: %(default)s)")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labels", metavar="FILE", help="classes of the images: 'name,label' lines, or JSON")
    labels.add_argument("--labels-from-folders", action="store_true", help="the class is the name of the folder")
    order = "what labels mean: names, wordnet, numbers, text (sorted), or auto (default), the one that fits"
    add("--labels-order", default="auto", metavar="ORDER", help=order)
    add("--weight-limit", type=int, metavar="L", help="largest level of a weight (default: 127, without VNNI 64)")
    add("--workers", type=int, metavar="N", help="processes that decode images (default: two)")
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--quiet", action="store_true", help="show no progress bars")
    add("--json", action="store_true", help="print the record as JSON")


def run(options: argparse.Namespace) -> int:
    """Check the output, quantise the model, write it and print the record."""
    from fastres.calibration import quantize, record_text
    from fastres.errors import OutputError
    from fastres.weights.sources import input_files

    output: Path = options.output
    refuse_unwritable(output, "resnet50.int8.safetensors")
    if output.suffix != ".safetensors":
        raise OutputError(f"The output {str(output)!r} does not end in .safetensors; add that suffix")
    labels = [options.labels] if options.labels else []
    inputs = input_files(options.model, options.weights, options.categories)
    refuse_inputs(output, [*options.images, *labels, *inputs])
    if output.exists() and not options.overwrite:
        raise OutputError(f"The output {str(output)!r} exists; use --overwrite to replace it, or another name")
    images = options.images[0] if len(options.images) == 1 else options.images
    model = quantize(
        options.model,
        images,
        weights=options.weights,
        categories=options.categories,
        method=options.method,
        keep=options.keep,
        largest_error=options.largest_error,
        labels="folders" if options.labels_from_folders else options.labels,
        labels_order=options.labels_order,
        samples=options.samples,
        weight_limit=options.weight_limit,
        workers=options.workers,
        progress=False if options.quiet else None,
    )
    model.save(output)
    wrote(output)
    size = output.stat().st_size / 1e6
    document = {"output": path_text(output), "megabytes": round(size, 3), **model.record}
    print(json_text(document) if options.json else f"{path_text(output)}: {size:,.1f} MB\n{record_text(model.record)}")
    return 0
