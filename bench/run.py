"""Compare fastres with other engines: ``python -m bench.run`` in a checkout, ``fastres bench`` once installed.

Each engine's logits are first compared with the logits of the same network in float64. An engine with wrong logits is
not timed. The correct engines are timed alternately in one process and compared with eager PyTorch and with the rates
of arithmetic and memory that the same run measures.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import fastres
from fastres.bench.engines.eager import EagerResNet
from fastres.bench.engines.peers import EAGER, FASTRES, PEERS, Peer, select
from fastres.bench.measure import ceilings, environment, timing
from fastres.bench.measure.calibration import calibrated
from fastres.bench.measure.comparison import TICKS, Setting, benchmark, release
from fastres.bench.report import results
from fastres.bench.report.results import UNSUPPORTED, LayerRow, Results, Row
from fastres.errors import DeviceError, FastresError, MissingDependencyError
from fastres.executors.quota import limit_threads
from fastres.extras import install
from fastres.model.model import parse_dtype
from fastres.network.architectures import get_architecture
from fastres.network.plan import check_image_size
from fastres.program import run_program
from fastres.terminal import json_text, progress_bar, wrote
from fastres.text import dtype_name, path_text
from fastres.wording import Wording

RANDOM = "random"
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


@dataclass(frozen=True)
class Options:
    """The settings of a run. A GPU ``device`` has an index; ``weights`` is ``"random"`` or an argument of ``load``."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    size: int
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    peers: tuple[Peer, ...] = PEERS
    quick: bool = False
    weights: str = RANDOM
    tf32: bool = False
    cold: bool = False
    float32: bool = True  # also time eager in float32, for ``ratio_to_eager_float32``


def run(options: Options, command: str = "", keep: Callable[[Results], object] | None = None) -> Results:
    """Benchmark every setting of ``options`` and return the environment and the rows.

    ``command`` is recorded in the results. ``keep`` is called after each engine with the results so far;
    ``environment["complete"]`` is false until the last call. Raise ``FastresError`` if a model, size or weights entry
    does not exist, or if a check cannot tell correct logits from wrong ones. An engine that cannot run gets a row with
    the reason.
    """
    for name in options.models:
        check_image_size(get_architecture(name), options.size, options.size)
    settings = list(_settings(options))
    on_device: AbstractContextManager[object] = nullcontext()
    if options.device.type == "cuda":
        on_device = torch.cuda.device(options.device)
    rows: list[Row] = []
    by_step: list[LayerRow] = []
    total = TICKS * sum(len(setting.peers) for setting in settings)
    with (
        environment.settings(options.tf32),
        on_device,
        progress_bar(total=total, desc="Measuring this machine", bar_format=BAR, disable=None) as progress,
    ):
        dtypes = dict.fromkeys(setting.dtype for setting in settings if setting.unsupported is None)
        measured = {dtype: ceilings.measure(options.device, dtype) for dtype in dtypes}
        by_name = {dtype_name(dtype): ceiling for dtype, ceiling in measured.items()}
        given = (options.weights, options.tf32, options.cold)
        where = environment.describe(options.device, command, *given, by_name)

        def kept(
            rows: Sequence[Row], by_step: Sequence[LayerRow], whole: bool,
            more: Sequence[Row], steps: Sequence[LayerRow],
        ) -> Results:  # fmt: skip
            known = results.with_float32_ratios([*rows, *more])
            found = Results({**where, "complete": whole}, known, (*by_step, *steps))
            if keep is not None:
                keep(found)
            return found

        network, of = None, ""
        for done, setting in enumerate(settings, start=1):
            if network is None or of != setting.model:
                network, of = load_network(setting.model, options.weights), setting.model
            if setting.unsupported is not None:
                rows.append(setting.row(FASTRES, UNSUPPORTED, setting.unsupported))
                progress.update(TICKS * len(setting.peers))
            else:
                budget = timing.QUICK if options.quick else timing.FULL
                so_far = partial(kept, tuple(rows), tuple(by_step), False)
                more, steps = benchmark(setting, network, measured[setting.dtype], budget, progress, so_far)
                rows += more
                by_step += steps
                release(options.device)
            found = kept(rows, by_step, done == len(settings), (), ())
    return found


def _settings(options: Options) -> Iterator[Setting]:
    """Yield every setting, float32 first. If float32 was not requested, only eager runs in it, as the baseline."""
    supported = any(FASTRES.absent(options.device, dtype) is None for dtype in options.dtypes)
    yardstick = [torch.float32] if supported and options.float32 else []
    dtypes = list(dict.fromkeys([*yardstick, *options.dtypes]))
    for model in options.models:
        for batch in options.batches:
            for dtype in dtypes:
                peers = options.peers if dtype in options.dtypes else (EAGER,)
                yield Setting(model, options.size, batch, dtype, options.device, peers, options.cold)


def load_network(model: str, weights: str) -> EagerResNet:
    """Return ``model`` as a float32 PyTorch module on the CPU, with calibrated random weights or with ``weights``."""
    if weights == RANDOM:
        return calibrated(get_architecture(model))
    loaded = fastres.load(model, weights)
    network = EagerResNet(loaded.architecture)
    network.load_state_dict(loaded.state_dict())
    return network.eval()


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DeviceError("--device cuda was given, but no CUDA GPU is available; use --device cpu or auto")
    return torch.device("cuda", torch.cuda.current_device()) if available and name != "cpu" else torch.device("cpu")


def _dtypes(names: str, device: torch.device) -> tuple[torch.dtype, ...]:
    auto = torch.float16 if device.type == "cuda" else torch.float32
    given = [torch.int8 if name.strip() == "int8" else parse_dtype(name.strip()) or auto for name in names.split(",")]
    return tuple(dict.fromkeys(given))


def _batches(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} was given; give positive integers separated by commas, such as 1,8")
    return tuple(int(part) for part in parts)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=(__doc__ or "").split("\n\n", 1)[1])
    engines = "; ".join(f"{peer.name} ({peer.what})" for peer in PEERS)
    parser.add_argument("--model", nargs="+", default=["resnet50"], help="one or more models (default resnet50)")
    parser.add_argument("--batch", type=_batches, default=(1, 8), help="batch sizes, separated by commas (default 1,8)")
    parser.add_argument("--size", type=int, default=224, help="image height and width in pixels (default 224)")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16, int8 or auto (default), separated by commas"
    )
    parser.add_argument("--only-dtype", action="store_true", help="do not also measure eager in float32")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto: a GPU if there is one"
    )
    parser.add_argument(
        "--peers", help=f"engines to compare with, separated by commas; eager always runs (default all): {engines}"
    )
    parser.add_argument("--without", help="engines to leave out, separated by commas, such as compile_max_autotune")
    parser.add_argument("--out", type=Path, help="folder for results, charts and report.html (default: none)")
    parser.add_argument(
        "--only-data", action="store_true", help="write only results into --out, no charts and no report.html"
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument(
        "--weights",
        default=RANDOM,
        help="random (default, no download), DEFAULT, the name of a weights entry, or a path",
    )
    parser.add_argument("--tf32", action="store_true", help="let every engine use TF32 for float32 on a GPU")
    parser.add_argument("--cold", action="store_true", help="measure first calls with empty compilation caches")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(arguments: Sequence[str] | None = None, program: str = "python -m bench.run") -> int:
    """Run the command line; ``program`` is its name in messages.

    Return 0 on success, 1 if fastres has wrong logits, fails or was never timed, and 2 if the benchmark cannot run.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser(program)
    given = parser.parse_args(arguments)
    try:
        draws = given.out is not None and not given.only_data
        needed = {"rich": not given.json, "matplotlib": draws, "jinja2": draws}
        missing = [name for name, used in needed.items() if used and importlib.util.find_spec(name) is None]
        if missing:
            raise MissingDependencyError(
                f"The benchmark needs packages that are not installed: {' and '.join(missing)}. "
                f"Install them with {install('bench')}"
            )
        from .report import show

        if given.out is not None:
            results.check_folder(given.out)
        device = _device(given.device)
        limit_threads()
        options = Options(
            tuple(dict.fromkeys(given.model)),
            tuple(dict.fromkeys(given.batch)),
            given.size,
            _dtypes(given.dtype, device),
            device,
            select(given.peers, given.without),
            given.quick,
            given.weights,
            given.tf32,
            given.cold,
            not given.only_dtype,
        )
        command = f"{program} {shlex.join(arguments)}".strip()
        found = run(options, command, None if given.out is None else lambda found: results.write(found, given.out))
        if given.out is not None:
            drawn = [] if given.only_data else show.write(found, given.out)
            names = [results.JSON_NAME, results.CSV_NAME, *(path.name for path in drawn)]
            wrote(given.out / results.JSON_NAME)
        if given.json:
            print(json_text(json.loads(found.as_json()), indent=1))
        else:
            show.show(found)
        if given.out is not None:
            print(f"Wrote {', '.join(names[:-1])} and {names[-1]} in {path_text(given.out)}", file=sys.stderr)
    except FastresError as error:
        print(f"{program}: {Wording(parser._option_string_actions)(str(error))}", file=sys.stderr)
        return 2
    return results.exit_code(found.rows)


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m bench.run"))
