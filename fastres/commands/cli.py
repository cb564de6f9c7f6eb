"""The ``fastres`` command: ``list``, ``predict``, ``classify``, ``inspect``, ``export``, ``look``, ``bench``,
``env``, ``demo``.

Each command imports what it needs when it runs. Commands print plain text; ``--json`` prints one JSON document instead.
For an error that fastres raises, the command prints the message on standard error and returns exit status 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastres.arguments import whole_number
from fastres.errors import FastresError
from fastres.images.categories import CATEGORIES_HELP
from fastres.terminal import usable_streams
from fastres.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    with usable_streams():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["bench"]:  # has its own parser
            from fastres.bench.run import main as bench

            return bench(arguments[1:], "fastres bench")
        options = _parser().parse_args(arguments)
        return int(options.run(options) or 0)
    except FastresError as error:
        print(f"fastres: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"fastres: {interrupt or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the pipe, such as head, has closed it
        sys.stderr.close()
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastres", description="ResNet inference as fast as the hardware allows.")
    parser.add_argument("--version", action="version", version=f"fastres {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="list the models, their sizes and published weights")
    _json_option(command)
    command.set_defaults(run=_list)

    command = commands.add_parser("predict", help="classify images")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    command.add_argument("--model", default="resnet50", help="a name from 'fastres list' (default: %(default)s)")
    command.add_argument(
        "--weights", default="DEFAULT", help="an entry such as IMAGENET1K_V1, or the path of a checkpoint"
    )
    command.add_argument("--categories", metavar="FILE", help=CATEGORIES_HELP)
    command.add_argument("--top-k", type=int, default=5, metavar="K", help="classes per image (default: %(default)s)")
    command.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="images per batch (default: %(default)s)"
    )
    command.add_argument("--device", default=None, help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    command.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (default: %(default)s)")
    _json_option(command)
    command.set_defaults(run=_predict)

    from . import classify as classification

    command = commands.add_parser("classify", help="classify a folder, tar or Parquet files of images into a table")
    classification.add_arguments(command)
    command.set_defaults(run=classification.run)

    command = commands.add_parser("inspect", help="describe a checkpoint, and say whether fastres can run it")
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a file, a saved folder or a cached hub id")
    _json_option(command)
    command.set_defaults(run=_inspect)

    from fastres.export import command as export

    command = commands.add_parser("export", help="write ONNX, a server's model repository or a torch.export program")
    export.add_arguments(command)
    command.set_defaults(run=export.run)

    from . import look

    command = commands.add_parser("look", help="draw what a network sees: filters, feature maps, class-activation maps")
    look.add_arguments(command)
    command.set_defaults(run=look.run)

    commands.add_parser("bench", help="compare the speed with other engines (see 'fastres bench --help')")

    command = commands.add_parser("env", help="show versions and hardware, for bug reports")
    _json_option(command)
    command.set_defaults(run=_env)

    command = commands.add_parser(
        "demo", help="classify real handwritten digits and compare ResNet-50's speed with PyTorch"
    )
    command.add_argument(
        "--out", type=Path, default=Path("fastres_demo.png"), help="the picture to write (default: %(default)s)"
    )
    command.add_argument("--quick", action="store_true", help="time with fewer repetitions")
    command.set_defaults(run=_demo)
    return parser


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _list(options: argparse.Namespace) -> None:
    import torch

    from fastres.folding.build import outline
    from fastres.network.architectures import ARCHITECTURES, state_dict_shapes
    from fastres.text import text_table
    from fastres.weights.published import entries

    models = []
    for name, arch in ARCHITECTURES.items():
        size = 32 if arch.stem == "cifar" else 224
        parameters = sum(
            torch.Size(shape).numel() for key, shape in state_dict_shapes(arch).items() if "running" not in key
        )
        gflop = sum(cost.flops for cost in outline(arch, torch.float32).costs(1, size, size)) / 1e9
        weights = {
            entry.name: {"acc1": entry.acc1, "default": entry.default, "megabytes": entry.file_mb}
            for entry in entries(name).values()
        }
        models.append(
            {"model": name, "parameters": parameters, "gflop": round(gflop, 3), "image_size": size, "weights": weights}
        )
    if options.json:
        return _print_json(models)
    rows = [("model", "parameters", "GFLOP", "image", "weights (top-1 accuracy, %)")]
    for model in models:
        found: Any = model["weights"]
        known = ", ".join(f"{entry} ({facts['acc1']:.2f})" for entry, facts in found.items())
        rows.append(
            (
                str(model["model"]),
                f"{model['parameters'] / 1e6:.2f} M",  # type: ignore[operator]
                f"{model['gflop']:.2f}",
                str(model["image_size"]),
                known or "none published; use weights=None, a path or a state dict",
            )
        )
    print(text_table(rows, right=(1, 2, 3)))
    return None


def _predict(options: argparse.Namespace) -> None:
    import torch

    from fastres.model.loading import load

    for name, value in (("--top-k", options.top_k), ("--batch-size", options.batch_size)):
        whole_number(value, name)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(options.model, options.weights, dtype=options.dtype, device=device, categories=options.categories)
    results = model.predict(options.images, options.top_k, batch_size=options.batch_size)
    if options.json:
        return _print_json(
            [
                {
                    "image": str(path),
                    "predictions": [{"label": p.label, "index": p.index, "score": p.score} for p in predictions],
                }
                for path, predictions in zip(options.images, results, strict=True)
            ]
        )
    for path, predictions in zip(options.images, results, strict=True):
        print(path)
        for prediction in predictions:
            print(f"  {prediction.score:7.2%}  {prediction.label}")
    return None


def _inspect(options: argparse.Namespace) -> int:
    from fastres.weights.inspect import run

    return run(options)


def _env(options: argparse.Namespace) -> None:
    from .environment import environment

    facts = environment()
    if options.json:
        return _print_json(facts)
    from fastres.text import text_table

    print(text_table([(key, str(value)) for key, value in facts.items()]))
    return None


def _demo(options: argparse.Namespace) -> None:
    from .demo import run

    run(options.out, options.quick)


if __name__ == "__main__":
    sys.exit(main())
