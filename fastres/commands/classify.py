"""``fastres classify``: the command line of :func:`fastres.classify`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

from fastres.arguments import CATEGORIES_HELP, MODEL_HELP
from fastres.terminal import json_text, wrote
from fastres.text import path_text

from .reading import add_reading

if TYPE_CHECKING:
    from fastres.classification import Report

EXAMPLES = """examples:
  fastres classify photos/ -o photos.parquet
  fastres classify 'photos/**/*.jpg' -o photos.csv --top-k 1
  fastres classify shards/*.tar -o features.parquet --embed
  fastres classify images.parquet -o classes.jsonl --columns id
  fastres classify photos/ -o photos.parquet --html photos.html
  fastres classify --browse photos.parquet                     (the page of a table that exists)
  fastres classify photos/ -o photos.parquet --resume
  fastres classify photos/ -o photos.parquet --shard 3/16      (on any machine, in any order)
  fastres classify --join photos.parquet                       (when all shards are finished)
  fastres classify s3://bucket/photos/ -o s3://bucket/photos.parquet --ray
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastres classify`` to ``parser``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add = parser.add_argument
    parser.set_defaults(parser=parser)
    add(
        "source",
        nargs="*",
        metavar="SOURCE",
        help="folder, glob, tar files (WebDataset) or Parquet files; paths or URLs",
    )
    add("-o", "--output", help="file or URL to write: .parquet, .csv or .jsonl")
    add("--model", default="resnet50", help=MODEL_HELP)
    add("--weights", default="DEFAULT", help="an entry such as IMAGENET1K_V1, or the path of a checkpoint")
    add("--categories", metavar="FILE", help=CATEGORIES_HELP)
    add("--top-k", type=int, default=5, metavar="K", help="classes per image (default: %(default)s)")
    add("--embed", action="store_true", help="also write the pooled features; with --top-k 0, write only these")
    add("--decoder", default="fast", help="fast (default), or exact: the same pixels as 'fastres predict'")
    add("--dtype", default="auto", help="float32, bfloat16, float16 (default: %(default)s)")
    add_reading(parser, "output")
    add("--processes", type=int, metavar="N", help="processes that share the work (default: one for each GPU)")
    add("--ray", nargs="?", const="", metavar="ADDRESS", help="share the work among the actors of a Ray cluster")
    add("--actors", type=int, metavar="N", help="Ray: actors, each with a model (default: as many as fit)")
    add("--num-cpus", type=float, metavar="N", help="Ray: cores of each actor (default: 1, or the share of its GPU)")
    add("--num-gpus", type=float, metavar="N", help="Ray: GPUs of each actor (default: 1 if the cluster has GPUs)")
    add("--shard", metavar="I/N", help="compute only the rows of shard I of N; see --join")
    add("--join", metavar="OUTPUT", help="write the output whose shards are computed; needs no SOURCE")
    add("--html", metavar="PAGE", help="also write a page with thumbnails, to look through the results")
    add("--html-pictures", type=int, metavar="N", help="thumbnails in the page, at most (default: 300)")
    add("--browse", metavar="TABLE", help="write the page of a table that exists; needs no SOURCE")
    add("--dry-run", action="store_true", help="write nothing; show images, shards and an estimate of the time")
    add("--resume", action="store_true", help="continue an interrupted run, if there is one")
    add("--overwrite", action="store_true", help="replace an existing output; discard an interrupted run")
    add("--quiet", action="store_true", help="show no progress bar")
    add("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> int:
    """Run :func:`classify` with the parsed ``options``, print the report and return 0."""
    from fastres.classification import classify, join_shards, plan_shards
    from fastres.classification.shards import Shard

    error = options.parser.error
    if options.browse is not None:
        return _browse(options)
    if options.html_pictures is not None and options.html is None:
        error("--html-pictures works only with --html or --browse")
    if options.join is not None:
        if others := _given(options, "join", "overwrite", "quiet", "json", "html", "html_pictures", "image_column"):
            error(f"--join takes the output alone, because the shards have the settings; leave out {', '.join(others)}")
        join = partial(join_shards, options.join, overwrite=options.overwrite, progress=not options.quiet)
        return _show(_with_page(join, options.join, options), options)
    required = {"SOURCE": options.source, "-o/--output": options.output}
    if missing := [name for name, value in required.items() if not value]:
        error(f"the following arguments are required: {', '.join(missing)}")
    if options.html is not None and not options.top_k:
        error("--html shows classes, but --top-k is 0")
    given = {
        "model": options.model,
        "weights": options.weights,
        "top_k": options.top_k,
        "embed": options.embed,
        "decoder": options.decoder,
        "batch_size": options.batch_size,
        "workers": options.workers,
        "device": options.device,
        "dtype": options.dtype,
        "categories": options.categories,
        "image_column": options.image_column,
        "columns": options.columns,
        "overwrite": options.overwrite,
        "progress": not options.quiet,
    }
    cluster = {"actors": options.actors, "num_cpus": options.num_cpus, "num_gpus": options.num_gpus}
    if options.ray is not None:
        if options.shard or options.processes or options.dry_run:
            error("--ray shares out the work itself; leave out --shard, --processes and --dry-run")
        from fastres.ray import classify as classify_on_ray

        cluster |= {"address": options.ray or None, "resume": options.resume}
        on_ray = partial(classify_on_ray, options.source, options.output, **given, **cluster)
        return _show(_with_page(on_ray, options.output, options), options)
    if chosen := [name for name, value in cluster.items() if value is not None]:
        error(f"--{chosen[0].replace('_', '-')} works only with --ray")
    if options.dry_run:
        if options.html:
            error("--dry-run writes nothing; leave out --html")
        if options.processes:
            error("--dry-run measures one process; leave out --processes (--shard 1/N shows the shares of N machines)")
        shards = Shard.of(options.shard).count if options.shard else 1
        plan = plan_shards(options.source, options.output, shards=shards, **given)
        data = {**asdict(plan), "output": path_text(plan.output)}
        print(json_text(data, indent=None) if options.json else plan)
        return 0
    page = {"html": options.html, "html_pictures": _pictures(options)}
    run_ = {"resume": options.resume, "shard": options.shard, "processes": options.processes}
    return _show(classify(options.source, options.output, **run_, **page, **given), options)


def _pictures(options: argparse.Namespace) -> int:
    from fastres.classification import HTML_PICTURES

    return HTML_PICTURES if options.html_pictures is None else options.html_pictures


def _browse(options: argparse.Namespace) -> int:
    """Write the page of a table that exists."""
    from fastres.classification.browsing import browse

    accepted = ("browse", "html", "html_pictures", "image_column", "overwrite", "quiet", "json")
    if others := _given(options, *accepted):
        options.parser.error(f"--browse classifies nothing; leave out {', '.join(others)}")
    made = browse(
        options.browse,
        options.html,
        pictures=_pictures(options),
        image_column=options.image_column,
        overwrite=options.overwrite,
        progress=not options.quiet,
    )
    wrote(made.html)
    print(json_text({**asdict(made), "html": path_text(made.html)}, indent=None) if options.json else made)
    return 0


def _with_page(make: Callable[[], Report], table: str, options: argparse.Namespace) -> Report:
    """Return the report of ``make``, which writes ``table``. Then write the page, if one is wanted."""
    if options.html is None:
        return make()
    from fastres.classification.browsing import browse, check_page

    pictures = _pictures(options)
    page = check_page(options.html, [table, *options.source], options.overwrite, pictures)
    report = make()
    progress = not options.quiet
    browse(table, page, pictures=pictures, image_column=options.image_column, overwrite=True, progress=progress)
    return replace(report, html=page)


def _given(options: argparse.Namespace, *accepted: str) -> list[str]:
    """Return the arguments that are not ``accepted`` and have another value than their default."""
    defaults = vars(options.parser.parse_args([]))
    names = {"source": "SOURCE", "output": "-o"}
    return [
        names.get(name, f"--{name.replace('_', '-')}")
        for name, default in defaults.items()
        if name not in accepted and getattr(options, name) != default
    ]


def _show(report: Report, options: argparse.Namespace) -> int:
    if report.shard is None:
        wrote(report.output, *([report.html] if report.html else []))
    data = {**asdict(report), "output": path_text(report.output)}
    if report.html is not None:
        data["html"] = path_text(report.html)
    print(json_text(data, indent=None) if options.json else report)
    return 0
