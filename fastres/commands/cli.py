"""The ``fastres`` command: ``list``, ``predict``, ``classify``, ``serve``, ``evaluate``, ``quantize``, ``inspect``,
``export``, ``look``, ``bench``, ``env``, ``demo``, ``photographs``, ``completion``.

Each command imports what it needs when it runs. Commands print plain text; ``--json`` prints one JSON document instead.
For an error that fastres raises, the command prints the message on standard error and returns exit status 2.
:mod:`fastres.program` has the rules for signals and for standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from fastres import interruption
from fastres.errors import UnknownModelError, near_matches
from fastres.program import run_program
from fastres.terminal import CLOSED, OutputStreamError, is_usable, json_text
from fastres.version import __version__
from fastres.wording import Wording

from . import completion


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status. Without ``arguments``, run that of this process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    wording = Wording()

    def run() -> int | None:
        command = _command(given, wording)
        if arguments is None and "torch" in sys.modules:
            from fastres.executors.quota import limit_threads

            limit_threads()
        interruption.started()
        return command()

    return run_program(run, "fastres", owner=arguments is None, starting=True, wording=wording)


def _command(arguments: list[str], wording: Wording) -> Callable[[], int | None]:
    """Parse the arguments, import what the command needs, and return the command. ``wording`` gets its options."""
    if arguments[:2] == ["bench", "serve"]:  # has its own parser
        from fastres.bench.serve.command import main as bench_serve

        return lambda: bench_serve(arguments[2:], "fastres bench serve")
    if arguments[:1] == ["bench"]:  # so has this
        from fastres.bench.run import main as bench

        return lambda: bench(arguments[1:], "fastres bench")
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        completion.complete(parser)
    if not arguments:
        parser.print_help()
        return lambda: 0
    _refuse_unknown_command(parser, arguments[0])
    options, left = parser.parse_known_args(arguments)
    wording.options = options.options_of_command
    if len(left) == 1 and not left[0].startswith("-") and getattr(options, "path", "") is None:
        options.path = left.pop()  # argparse gives up an optional path that comes after other options
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if options.prints and not is_usable(sys.stdout):
        raise OutputStreamError(CLOSED)  # before the work, because nothing would come of it
    if options.first:
        print(options.first, flush=True)
    for module in options.needs:
        with contextlib.suppress(ImportError):  # the command says which package is missing
            importlib.import_module(module)
    return lambda: options.run(options)


def _refuse_unknown_command(parser: argparse.ArgumentParser, given: str) -> None:
    """End the program, with similar names, if ``given`` is no command."""
    known = completion.commands_of(parser)
    if not given.startswith("-") and given not in known:
        parser.error(f"there is no command {given!r}.{near_matches(given, known)} 'fastres --help' lists all")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastres", description="Run ResNets fast, on a CPU or a GPU.")
    parser.add_argument("--version", action="version", version=f"fastres {__version__}")
    # ``prints``: the result is the text. ``needs``: modules to import before the work, which signals can interrupt.
    # ``first``: what to print before that, because importing torch takes seconds.
    parser.set_defaults(prints=False, needs=(), first="")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="list the models, their sizes and published weights")
    command.add_argument("patterns", nargs="*", metavar="PATTERN", help="only these, such as 'resnet5*' (default: all)")
    command.add_argument("--pretrained", action="store_true", help="only models with published weights")
    _json_option(command)
    command.set_defaults(run=_list, prints=True)

    from . import predict

    command = commands.add_parser("predict", help="classify images")
    predict.add_arguments(command)
    command.set_defaults(run=predict.run, prints=True, needs=["fastres.model.loading"])

    from . import classify as classification

    command = commands.add_parser("classify", help="classify a folder, tar or Parquet files of images into a table")
    classification.add_arguments(command)
    command.set_defaults(run=classification.run, needs=["fastres.classification", "fastres.classification.run"])

    from . import evaluate

    command = commands.add_parser("evaluate", help="measure accuracy and speed of models on labelled images")
    evaluate.add_arguments(command)
    command.set_defaults(run=evaluate.run, needs=["fastres.evaluation", "fastres.evaluation.run"])

    from . import serve

    command = commands.add_parser("serve", help="answer images over HTTP")
    serve.add_arguments(command)
    command.set_defaults(run=serve.run, needs=["fastres.serving", "fastres.serving.running"])

    from . import quantize

    command = commands.add_parser("quantize", help="convert a model to 8 bit, with scales that fit your images")
    quantize.add_arguments(command)
    command.set_defaults(run=quantize.run, needs=["fastres.calibration", "fastres.classification.batches"])

    command = commands.add_parser("inspect", help="describe a checkpoint, and say whether fastres can run it")
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a file, a saved folder or a hub id")
    _json_option(command)
    command.set_defaults(run=_inspect, prints=True, needs=["fastres.weights.inspect"])

    from fastres.export import command as export

    command = commands.add_parser("export", help="write ONNX, a server's model repository or a torch.export program")
    export.add_arguments(command)
    command.set_defaults(run=export.run, needs=["fastres.export.onnx"])

    from . import look

    command = commands.add_parser("look", help="draw what a network sees: filters, feature maps, class-activation maps")
    look.add_arguments(command)
    command.set_defaults(run=look.run, needs=["fastres.model.loading", "fastres.look.figures", "matplotlib.figure"])

    commands.add_parser("bench", help="compare the speed with other engines; 'bench serve': of servers")

    command = commands.add_parser("env", help="show versions and hardware, for bug reports")
    _json_option(command)
    command.set_defaults(run=_env, prints=True, needs=["fastres.commands.environment"])

    command = commands.add_parser(
        "demo", help="classify real handwritten digits and compare ResNet-50's speed with PyTorch"
    )
    command.add_argument(
        "--out", default="fastres_demo.png", metavar="FILE", help="the picture to write (default: %(default)s)"
    )
    command.add_argument("--quick", action="store_true", help="time with fewer repetitions")
    first = f"fastres {__version__}: reads handwritten digits, then compares ResNet-50's speed with PyTorch's\n"
    command.set_defaults(
        run=_demo, first=first, needs=["fastres.commands.demo", "sklearn.datasets", "matplotlib.figure"]
    )

    from . import photographs

    command = commands.add_parser("photographs", help="write eight photographs to try fastres on")
    photographs.add_arguments(command)
    command.set_defaults(run=photographs.run, needs=["skimage.data", "sklearn.datasets", "matplotlib.cbook"])

    command = commands.add_parser("completion", help="print the code with which a shell completes fastres commands")
    completion.add_arguments(command)
    command.set_defaults(run=completion.run, prints=True)
    for command in commands.choices.values():
        command.set_defaults(options_of_command=tuple(command._option_string_actions))
    return parser


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _list(options: argparse.Namespace) -> int:
    from fastres.network.catalogue import matching
    from fastres.text import text_table

    models = matching(options.patterns or "*", pretrained=options.pretrained)
    if options.json:
        print(json_text(models))
        return 0
    if not models:
        raise UnknownModelError(f"No model matches {' '.join(options.patterns)}. 'fastres list' lists all.")
    rows = [("model", "params", "GFLOP", "image", "weights, top-1 accuracy in %")]
    for model in models:
        known = ", ".join(f"{name} {facts['acc1']:.1f}" for name, facts in model["weights"].items())
        size = (f"{model['parameters'] / 1e6:.1f}M", f"{model['gflop']:.2f}", str(model["image_size"]))
        rows.append((model["model"], *size, known or "your own"))
    print(text_table(rows, right=(1, 2, 3)))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from fastres.weights.inspect import run

    return run(options)


def _env(options: argparse.Namespace) -> None:
    from .environment import environment

    facts = environment()
    if options.json:
        return print(json_text(facts))
    from fastres.text import text_table

    print(text_table([(key, str(value)) for key, value in facts.items()]))
    return None


def _demo(options: argparse.Namespace) -> None:
    from .demo import run

    run(options.out, options.quick)


if __name__ == "__main__":
    sys.exit(main())
