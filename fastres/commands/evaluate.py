"""``fastres evaluate``: the command line of :func:`fastres.evaluate`."""

from __future__ import annotations

import argparse
import shlex
import sys

from fastres.arguments import CATEGORIES_HELP
from fastres.terminal import json_text, wrote

from .reading import add_reading

EXAMPLES = """examples:
  fastres evaluate photos/ --model resnet18 resnet50 -o evaluation
  fastres evaluate photos/ --model resnet18 --weights trained.pth --dtype float32 bfloat16 --engine fastres openvino
  fastres evaluate photos/ --model resnet18 resnet18.int8.safetensors resnet18.onnx
  fastres evaluate photos/*.jpg --labels labels.csv
  fastres evaluate test.parquet --label-column fine_label
  fastres evaluate photos/ --model resnet50 resnet50.onnx --dtype bfloat16 --against float32
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastres evaluate`` to ``parser``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("source", nargs="+", metavar="SOURCE", help="folder with a folder per class, glob, tar or Parquet files")
    add("-o", "--output", metavar="DIR", help="folder for report.html, evaluation.json and images.parquet")
    add("--model", nargs="+", default=["resnet50"], metavar="MODEL",
        help="names from 'fastres list', saved files, hub ids, exported files (default: resnet50)")  # fmt: skip
    add("--weights", default="DEFAULT", help="an entry such as IMAGENET1K_V1, or the path of a checkpoint")
    add("--categories", metavar="FILE", help=CATEGORIES_HELP)
    add("--dtype", nargs="+", default=["auto"], help="float32, bfloat16, float16, int8 (default: the model's own)")
    add("--engine", nargs="+", default=[], help="fastres, eager, onnxruntime, openvino (default: fastres)")
    add("--labels", default="auto", metavar="L",
        help="folders, or a file: 'name,label' lines, or JSON (default: by the kind of source)")  # fmt: skip
    add("--class-order", default="auto", help="what labels mean: names, wordnet, numbers, text (default: found out)")
    add("--label-column", metavar="NAME", help="Parquet: column of labels (default: 'label')")
    add("--allow-empty", action="store_true", help="accept class folders without images")
    add(
        "--against",
        metavar="REF",
        help="compare with this dtype of the same model, or with this model; needs no labels",
    )
    add("--calibrate-on", nargs="+", metavar="IMAGES", help="int8: other images, for the scales")
    add("--decoder", default="exact", help="exact (default): the pixels of 'fastres predict', or fast")
    add_reading(parser, "table")
    add("--resume", action="store_true", help="continue an interrupted evaluation, if there is one")
    add("--overwrite", action="store_true", help="replace an existing evaluation")
    add("--quiet", action="store_true", help="show no progress bar")
    add("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> int:
    """Run :func:`evaluate` with the parsed ``options``, and print the result. Return 1 if no image could be read."""
    from fastres.evaluation import evaluate

    result = evaluate(
        options.source,
        options.model,
        options.output,
        labels=options.labels,
        class_order=options.class_order,
        label_column=options.label_column,
        allow_empty=options.allow_empty,
        against=options.against,
        dtypes=options.dtype,
        engines=options.engine or None,
        weights=options.weights,
        categories=options.categories,
        device=options.device,
        calibrate_on=options.calibrate_on,
        decoder=options.decoder,
        batch_size=options.batch_size,
        workers=options.workers,
        image_column=options.image_column,
        columns=options.columns,
        resume=options.resume,
        overwrite=options.overwrite,
        progress=not options.quiet,
        command=shlex.join(["fastres", *sys.argv[1:]]),
    )
    if result.output is not None:
        wrote(result.output / "report.html")
    print(json_text(result.document()) if options.json else result)
    return int(not result.images)
