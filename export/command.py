"""``fastres export``: the command line of this package.

``fastres.commands.cli`` passes the parser to :func:`add_arguments` and the parsed options to :func:`run`. Modules that
need onnx are imported only when the command runs, so that its help works without onnx.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from fastres.arguments import CATEGORIES_HELP
from fastres.errors import InputError
from fastres.files import refuse_inputs
from fastres.terminal import json_text, wrote
from fastres.text import path_text

EXAMPLES = """examples:
  fastres export resnet50 resnet50.onnx
  fastres export resnet50 resnet50.onnx --preprocessing --outputs logits top_k
  fastres export resnet50 resnet50.onnx --int8 --calibration photographs/ --time
  fastres export resnet50.int8.safetensors resnet50.onnx
  fastres export resnet50 --server-repository models/
  fastres export resnet50 --torch resnet50.pt2
  fastres export --inspect resnet50.onnx
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastres export`` to ``parser``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("model", nargs="?", help="name of the model (fastres list shows all), or a file that model.save wrote")
    add("path", nargs="?", help="ONNX file to write")
    add(
        "--weights",
        default="DEFAULT",
        help="entry, checkpoint file, or 'none' for random weights (default: the best entry)",
    )
    add("--num-classes", type=int, help="number of classes, if different from the number in the weights")
    add("--categories", metavar="FILE", help=CATEGORIES_HELP)
    add("--opset", type=int, default=18, help="ONNX opset (default: 18)")
    add("--dtype", default="float32", help="float32 (default) or float16")
    add(
        "--image-size",
        nargs="+",
        metavar="PIXELS",
        help="one side, height and width, or 'dynamic' (default: the weights' size)",
    )
    add("--batch", default="dynamic", help="batch size, or 'dynamic' (default)")
    add("--preprocessing", action="store_true", help="take uint8 pictures; resize, crop and normalise in the graph")
    add("--outputs", nargs="+", default=["logits"], help="logits (default), softmax, top_k, embedding, stem, layer1, …")
    add("--top-k", type=int, default=5, help="number of classes in the output top_k (default: 5)")
    add("--no-verify", action="store_true", help="do not compare the file's results with fastres's")
    add("--time", action="store_true", help="time a file in 8 bit beside its float32 export")
    add("--weight-limit", type=int, metavar="L", help="largest level of a weight in 8 bit; 64 suits CPUs without VNNI")
    add("--int8", action="store_true", help="quantise to int8; needs --calibration")
    add("--calibration", metavar="DIR", help="images like those that the int8 model will see, as for fastres quantize")
    add(
        "--least-agreement",
        type=float,
        metavar="SHARE",
        help="fail if int8 and float32 agree on fewer images (default: 0.95)",
    )
    add("--server-repository", metavar="DIR", help="write a model repository for NVIDIA Triton Inference Server")
    add("--max-batch-size", type=int, default=32, help="largest batch that the server forms (default: 32)")
    add("--torch", metavar="FILE.pt2", help="write a torch.export program, which loads with torch alone")
    add("--inspect", metavar="FILE", help="print the inputs, outputs and metadata of an exported ONNX file")
    add("--json", action="store_true", help="print the report as JSON")
    add("--quiet", action="store_true", help="show no progress")


def run(options: argparse.Namespace) -> int:
    """Run the export that the parsed ``options`` describe and print its report; return 0.

    Raises ``InputError`` for options that cannot be combined, and the errors of the exporters.
    """
    report = _report(options)
    if options.inspect is None:
        wrote(options.path or options.torch or options.server_repository)
    print(json_text(as_data(report), indent=1) if options.json else report)
    return 0


def as_data(report: Any) -> dict[str, Any]:
    """Return a report as data for JSON; paths become strings."""
    data = report.as_dict() if hasattr(report, "as_dict") else _plain(report)
    return dict(data)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(item) for key, item in asdict(value).items()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return path_text(value) if isinstance(value, Path) else value


def _report(options: argparse.Namespace) -> Any:
    targets = {
        "a path": options.path,
        "--server-repository": options.server_repository,
        "--torch": options.torch,
        "--inspect": options.inspect,
    }
    given = [name for name, value in targets.items() if value is not None]
    if len(given) != 1:
        raise InputError(
            f"{' and '.join(given) + ' were' if given else 'Nothing was'} given to write or inspect; give exactly one "
            "of a path, --server-repository DIR, --torch FILE and --inspect FILE. For example: "
            "fastres export resnet50 resnet50.onnx"
        )
    if options.inspect is not None:
        from .metadata import inspect

        return inspect(options.inspect)
    if options.model is None:
        raise InputError("No model was given; give its name, for example: fastres export resnet50 resnet50.onnx")
    return _export(options)


def _export(options: argparse.Namespace) -> Any:
    from fastres.network.architectures import ARCHITECTURES

    from .files import checked_folder, checked_target

    if options.calibration is not None and not options.int8:
        raise InputError("--calibration is for int8 models; add --int8, or leave --calibration out")
    if (target := options.path or options.torch) is not None:
        target = checked_target(target, options.model, options.weights, options.categories, utf8=options.torch is None)
        if options.calibration is not None and target.exists():
            folder = Path(options.calibration).expanduser().resolve()
            refuse_inputs(target, [target] if folder in target.parents else [])
    model, weights = _model(options)
    size, batch, progress = _image_size(options.image_size), _batch(options.batch), not options.quiet
    shared: dict[str, Any] = {"weights": weights, "image_size": size, "progress": progress}
    graph = {"opset": options.opset, "outputs": tuple(options.outputs), "top_k": options.top_k}
    graph |= {"dtype": options.dtype, "preprocessing": options.preprocessing, "verify": not options.no_verify}
    graph |= {"time": options.time, "weight_limit": options.weight_limit}
    if options.int8:
        return _export_int8(options, model, {"batch": batch, **shared}, graph)
    if options.torch is not None:
        from .pytorch import export_torch

        refused = (("preprocessing", False), ("outputs", ["logits"]), ("time", False), ("weight_limit", None))
        _refuse(options, "--torch", *refused)
        shared |= {"batch": batch, "dtype": options.dtype, "verify": not options.no_verify}
        return export_torch(model, options.torch, **shared)
    if options.server_repository is not None:
        from .server import export_server_repository

        _refuse(options, "--server-repository", ("batch", "dynamic"))
        name = model if isinstance(model, str) else model.architecture.name
        if name in ARCHITECTURES:
            checked_folder(Path(options.server_repository) / name, options.weights, options.categories)
        folder, largest = options.server_repository, options.max_batch_size
        return export_server_repository(model, folder, max_batch_size=largest, **shared, **graph)
    from .onnx import export

    return export(model, options.path, batch=batch, **shared, **graph)


def _export_int8(options: argparse.Namespace, model: Any, shared: dict[str, Any], graph: dict[str, Any]) -> Any:
    from .quantisation import LEAST_AGREEMENT, export_int8

    if options.calibration is None:
        raise InputError("--int8 needs images to calibrate on; add --calibration DIR, a folder of a few hundred images")
    if options.path is None:
        raise InputError("--int8 writes one ONNX file; give its path")
    _refuse(options, "--int8", ("dtype", "float32"))
    least = LEAST_AGREEMENT if options.least_agreement is None else options.least_agreement
    del graph["dtype"]
    return export_int8(model, options.path, options.calibration, least_agreement=least, **shared, **graph)


def _model(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model and weights for the exporters; load the model here only if its classes are described."""
    weights = None if options.weights.lower() == "none" else options.weights
    if options.num_classes is None and options.categories is None:
        return options.model, weights
    from fastres.model.loading import load

    model = load(
        options.model,
        weights,
        num_classes=options.num_classes,
        categories=options.categories,
        progress=not options.quiet,
    )
    return model, "DEFAULT"


def _refuse(options: argparse.Namespace, target: str, *defaults: tuple[str, Any]) -> None:
    """Raise ``InputError`` for an option that ``target`` would ignore."""
    for name, default in defaults:
        if getattr(options, name) != default:
            raise InputError(f"--{name.replace('_', '-')} cannot be combined with {target}; leave it out")


def _image_size(words: Sequence[str] | None) -> Any:
    """Return the size as the exporters take it; they reject words that are not numbers."""
    if words is None:
        return None
    sizes = [int(word) if word.isdecimal() else word for word in words]
    return sizes[0] if len(sizes) == 1 else tuple(sizes)


def _batch(word: str) -> int | str:
    return int(word) if word.isdecimal() else word
