"""``python -m bench.run`` in a checkout, ``fastres bench`` once installed: correctness, then time.

Each engine's logits are compared with the same network's in float64 before it is timed; an engine that is wrong is not
timed. Those that are right are timed in turn, beside eager PyTorch and under the ceilings measured in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import fastres
from fastres.architectures import get_architecture
from fastres.errors import DeviceError, FastresError, MissingDependencyError
from fastres.folding import outline
from fastres.model import parse_dtype
from fastres.plan import check_image_size
from fastres.text import dtype_name

from . import ceilings, environment, layers, results, timing
from .calibration import calibrated
from .checking import Checks, Error, error_limit, make_checks, relative_error
from .eager import EagerResNet
from .peers import EAGER, FASTRES, PEERS, Engine, Peer, select
from .results import ABSENT, FAILED, OK, UNSUPPORTED, WRONG, LayerRow, Results, Row, significant
from .roofline import roofline

RANDOM = "random"
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
TICKS = 100  # of the progress bar, for each engine of each setting: half to build and check it, half to time it


@dataclass(frozen=True)
class Options:
    """What to run. ``device`` has an index where it is a GPU; ``weights`` is ``"random"`` or what ``load`` takes."""

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


@dataclass(frozen=True)
class Setting:
    """What all engines are compared on."""

    model: str
    size: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    peers: tuple[Peer, ...]
    cold: bool = False

    @property
    def unsupported(self) -> str | None:
        """Why fastres does not compute in this dtype here; then there is nothing to compare."""
        reasons = [peer.reason_absent(self.device, self.dtype) for peer in self.peers if peer.name == FASTRES.name]
        return reasons[0] if reasons else None

    def row(self, peer: Peer, status: str, note: str = "") -> Row:
        return Row(self.model, self.size, self.batch, dtype_name(self.dtype), peer.name, status, note=note)


def run(options: Options, command: str = "", keep: Callable[[Results], object] | None = None) -> Results:
    """Benchmark every setting of ``options``; returns environment and rows.

    ``command`` is noted as what was run. ``keep`` is called after each setting with the results so far
    (``environment["complete"]`` is false until the last). Raises ``FastresError`` for a model, size or weights that do
    not exist and where a check could not tell right from wrong; an engine that cannot be run is a row.
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
        tqdm(total=total, desc="Measuring this machine", bar_format=BAR, disable=None) as progress,
    ):
        dtypes = dict.fromkeys(setting.dtype for setting in settings if setting.unsupported is None)
        measured = {dtype: ceilings.measure(options.device, dtype) for dtype in dtypes}
        by_name = {dtype_name(dtype): ceiling for dtype, ceiling in measured.items()}
        given = (options.weights, options.tf32, options.cold)
        where = environment.describe(options.device, command, *given, by_name)
        network, of = None, ""
        for done, setting in enumerate(settings, start=1):
            if network is None or of != setting.model:
                network, of = load_network(setting.model, options.weights), setting.model
            if setting.unsupported is not None:
                rows.append(setting.row(FASTRES, UNSUPPORTED, setting.unsupported))
                progress.update(TICKS * len(setting.peers))
            else:
                budget = timing.QUICK if options.quick else timing.FULL
                more, steps = benchmark(setting, network, measured[setting.dtype], budget, progress)
                rows += more
                by_step += steps
                _release(options.device)
            whole = done == len(settings)
            found = Results({**where, "complete": whole}, results.with_float32_ratios(rows), tuple(by_step))
            if keep is not None:
                keep(found)
    return found


def _settings(options: Options) -> Iterator[Setting]:
    """Every setting; float32 first, with eager alone where only the yardstick is wanted of it."""
    supported = any(FASTRES.reason_absent(options.device, dtype) is None for dtype in options.dtypes)
    dtypes = list(dict.fromkeys([torch.float32, *options.dtypes] if supported else options.dtypes))
    for model in options.models:
        for batch in options.batches:
            for dtype in dtypes:
                peers = options.peers if dtype in options.dtypes else (EAGER,)
                yield Setting(model, options.size, batch, dtype, options.device, peers, options.cold)


def load_network(model: str, weights: str) -> EagerResNet:
    """The network of ``model`` as plain PyTorch, float32 on the CPU: calibrated random, or with loaded weights."""
    if weights == RANDOM:
        return calibrated(get_architecture(model))
    loaded = fastres.load(model, weights)
    network = EagerResNet(loaded.architecture)
    network.load_state_dict(loaded.state_dict())
    return network.eval()


def benchmark(
    setting: Setting, network: EagerResNet, limits: ceilings.Ceilings, budget: timing.Budget, progress: tqdm
) -> tuple[list[Row], tuple[LayerRow, ...]]:
    """One row for each engine of ``setting``, which begins with eager: built, checked, then timed in turn.

    Also the time of each step of fastres, where fastres is among them and right.
    """
    progress.set_description(f"{setting.model} {dtype_name(setting.dtype)}, batch {setting.batch}")
    with torch.inference_mode():
        checks = make_checks(network, setting.batch, setting.size, setting.device, setting.dtype)
        rows: list[Row] = []
        engines: dict[str, Callable[[], object]] = {}
        model: Engine | None = None
        eager_error = Error(math.inf, math.inf)
        for peer in setting.peers:
            progress.set_postfix_str(peer.name)
            row, error, engine = _admit(setting, peer, network, checks, eager_error)
            if peer.name == EAGER.name:
                if row.status != OK or error is None:
                    raise FastresError(f"Eager PyTorch, which all are judged by, is {row.status} here: {row.note}")
                eager_error = error
            rows.append(row)
            if engine is not None:
                engines[peer.name] = _call(engine, peer, checks)
                model = engine if peer.name == FASTRES.name else model
            progress.update(TICKS // 2)
        progress.set_postfix_str("timing")
        start, half = progress.n, TICKS // 2 * len(rows)
        samples = timing.interleaved(
            engines, setting.device, budget, lambda share: progress.update(start + half * share - progress.n)
        )
        steps: tuple[LayerRow, ...] = ()
        if isinstance(model, fastres.Model):
            progress.set_postfix_str("layer by layer")
            try:
                steps = layers.measure(model, checks.batches[0], limits)
            except FastresError as error:
                progress.write(f"fastres bench: not measured layer by layer: {error}", file=sys.stderr)
    return _timed(setting, network, rows, samples, limits), steps


def _call(engine: Engine, peer: Peer, checks: Checks) -> Callable[[], object]:
    x = peer.example(checks.batches[0])
    return lambda: engine(x)


def _admit(
    setting: Setting, peer: Peer, network: EagerResNet, checks: Checks, eager_error: Error
) -> tuple[Row, Error | None, Engine | None]:
    """Build ``peer``, measuring its first call, and check its logits; the engine only if it may be timed."""
    reason = peer.reason_absent(setting.device, setting.dtype)
    if reason is not None:
        return setting.row(peer, ABSENT, reason), None, None
    x = peer.example(checks.batches[0])

    def build() -> Engine:
        engine = peer.build(network, x)
        engine(x)
        return engine

    try:
        with environment.compilation_caches(empty=setting.cold):
            engine, seconds, growth = timing.measured(build, setting.device)
        error = relative_error(engine, peer, checks)
    # Whatever another library raises while it is built or run is the reason why it is absent.
    except Exception as problem:
        reason = f"{type(problem).__name__}: {str(problem).strip()}".splitlines()[0][:300]
        return setting.row(peer, FAILED if peer.name == FASTRES.name else ABSENT, reason), None, None
    unknown = peer.own_memory and setting.device.type == "cuda"
    limit = error_limit(peer, setting.dtype, eager_error, checks)
    row = dataclasses.replace(
        setting.row(peer, OK),
        max_rel_error=significant(error.worst),
        error_limit=significant(limit.worst),
        first_call_s=significant(seconds),
        peak_memory_mb=None if unknown else significant(growth / 1e6),
    )
    if error.within(limit):
        return row, error, engine
    off = [
        f"{of} by {found:.2e}, where at most {most:.2e} is accepted (eager: {own:.2e})"
        for of, found, most, own in (
            ("on average", error.typical, limit.typical, eager_error.typical),
            ("on the worst image", error.worst, limit.worst, eager_error.worst),
        )
        if not found <= most
    ]
    note = f"its logits are off {' and '.join(off)}"
    return dataclasses.replace(row, status=WRONG, note=note), error, None


def _timed(
    setting: Setting,
    network: EagerResNet,
    rows: list[Row],
    samples: dict[str, list[float]],
    limits: ceilings.Ceilings,
) -> list[Row]:
    """The rows with what follows from the samples."""
    plan = outline(network.architecture, setting.dtype)
    bound = roofline(plan.costs(setting.batch, setting.size, setting.size, setting.dtype), limits)
    eager = timing.Quantiles.of(samples[EAGER.name]).p50
    timed = []
    for row in rows:
        if row.engine in samples:
            ms = timing.Quantiles.of(samples[row.engine])
            seconds = ms.p50 / 1e3
            row = dataclasses.replace(
                row,
                p20_ms=significant(ms.p20),
                p50_ms=significant(ms.p50),
                p80_ms=significant(ms.p80),
                images_per_s=significant(setting.batch / seconds),
                ratio_to_eager=significant(eager / ms.p50),
                tflops=significant(bound.flops / seconds / 1e12),
                gb_per_s=significant(bound.bytes / seconds / 1e9),
                roofline_ms=significant(bound.seconds * 1e3),
                roofline_share=significant(bound.seconds / seconds),
                samples=len(samples[row.engine]),
            )
        timed.append(row)
    return timed


def _release(device: torch.device) -> None:
    """Forget what was compiled: Dynamo refuses to compile one module's code for ever more settings."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DeviceError("--device cuda was given and no CUDA GPU is available; give --device cpu or auto")
    return torch.device("cuda", torch.cuda.current_device()) if available and name != "cpu" else torch.device("cpu")


def _dtypes(names: str, device: torch.device) -> tuple[torch.dtype, ...]:
    auto = torch.float16 if device.type == "cuda" else torch.float32
    return tuple(dict.fromkeys(parse_dtype(name.strip()) or auto for name in names.split(",")))


def _batches(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} was given; give whole numbers from 1 by commas, such as 1,8")
    return tuple(int(part) for part in parts)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=(__doc__ or "").split("\n\n", 1)[1])
    engines = "; ".join(f"{peer.name} ({peer.what})" for peer in PEERS)
    parser.add_argument("--model", nargs="+", default=["resnet50"], help="one or several (default resnet50)")
    parser.add_argument("--batch", type=_batches, default=(1, 8), help="batch sizes, such as 1,8 (default)")
    parser.add_argument("--size", type=int, default=224, help="image height and width in pixels (default 224)")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16, several by commas, or auto (default)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--peers", help=f"what to compare with, by commas; eager always runs (default all): {engines}")
    parser.add_argument("--without", help="engines not to compare with, by commas, such as compile_max_autotune")
    parser.add_argument("--out", type=Path, help="folder for results, charts and report.html (default: none)")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--weights", default=RANDOM, help="random (default, no download), DEFAULT, an entry or a path")
    parser.add_argument("--tf32", action="store_true", help="let every engine use TF32 for float32 (GPU)")
    parser.add_argument("--cold", action="store_true", help="measure first calls with empty compilation caches")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(arguments: Sequence[str] | None = None, program: str = "python -m bench.run") -> int:
    """The command line, as ``program``.

    Returns 0, or 1 where fastres is wrong, fails or ran nowhere, or 2 for what cannot be run.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    given = _parser(program).parse_args(arguments)
    try:
        needed = {"rich": not given.json, "matplotlib": given.out is not None, "jinja2": given.out is not None}
        missing = [name for name, used in needed.items() if used and importlib.util.find_spec(name) is None]
        if missing:
            raise MissingDependencyError(
                f"The benchmark needs {' and '.join(missing)}, not installed here: pip install 'fastres[bench]'"
            )
        from . import report

        device = _device(given.device)
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
        )
        command = f"{program} {shlex.join(arguments)}".strip()
        found = run(options, command, None if given.out is None else lambda found: results.write(found, given.out))
        if given.json:
            print(found.as_json(), end="")
        else:
            report.show(found)
        if given.out is not None:
            names = [results.JSON_NAME, results.CSV_NAME, *(path.name for path in report.write(found, given.out))]
            print(f"Wrote {', '.join(names[:-1])} and {names[-1]} in {given.out}", file=sys.stderr)
    except FastresError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return results.exit_code(found.rows)


if __name__ == "__main__":
    sys.exit(main())
