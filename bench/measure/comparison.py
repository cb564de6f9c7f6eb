"""Build all engines of one setting, check them against float64, and time them.

A failure never loses earlier measurements. Engines that build quickly are built and timed first. Engines that compile
for minutes follow, one by one. Each change is passed to ``keep`` at once. At the end, all engines are timed
alternately, so that the final values all come from the same few minutes.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import fastres
from fastres.bench.engines.eager import EagerResNet
from fastres.bench.engines.peers import EAGER, FASTRES, Engine, Peer
from fastres.bench.report.results import ABSENT, FAILED, OK, WRONG, LayerRow, Row, significant
from fastres.errors import FastresError
from fastres.folding.build import outline
from fastres.roofline.bound import roofline
from fastres.text import dtype_name

from . import ceilings, environment, layers, timing
from .calibration import pixels, smooth_images
from .checking import Checks, Error, error_limit, make_checks, relative_error

CALIBRATION_IMAGES, CALIBRATION_SEED = 16, 10_000  # for models in 8 bit
TICKS = 100  # progress bar units per engine: half to build and check it, half to time it


@dataclass(frozen=True)
class Setting:
    """The model, input and device on which engines are compared."""

    model: str
    size: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    peers: tuple[Peer, ...]
    cold: bool = False

    @property
    def unsupported(self) -> str | None:
        """The reason why fastres does not support this dtype on this device, or ``None`` if it does."""
        reasons = [peer.absent(self.device, self.dtype) for peer in self.peers if peer.name == FASTRES.name]
        return reasons[0] if reasons else None

    def row(self, peer: Peer, status: str, note: str = "") -> Row:
        return Row(self.model, self.size, self.batch, dtype_name(self.dtype), peer.name, status, note=note)


Keep = Callable[[Sequence[Row], tuple[LayerRow, ...]], object]


@dataclass
class Comparison:
    """The state of a comparison: a row for each engine tried so far, and the engines that may be timed."""

    setting: Setting
    network: EagerResNet
    limits: ceilings.Ceilings
    progress: tqdm
    rows: dict[str, Row]
    engines: dict[str, Callable[[], object]]
    quantized: Path | None = None  # the file of the model in 8 bit, if the setting is in int8
    model: fastres.Model | None = None
    eager_error: Error = dataclasses.field(default_factory=lambda: Error(math.inf, math.inf))

    def admit(self, peer: Peer, checks: Checks) -> None:
        """Build and check an engine. Raise ``FastresError`` if it is eager PyTorch, the baseline, and not correct."""
        self.progress.set_postfix_str(peer.name)
        row, error, engine = _admit(self.setting, peer, self.network, self.quantized, checks, self.eager_error)
        if peer.name == EAGER.name:
            if row.status != OK or error is None:
                raise FastresError(f"Eager PyTorch, the baseline of all comparisons, is {row.status} here: {row.note}")
            self.eager_error = error
        self.rows[peer.name] = row
        if engine is not None:
            self.engines[peer.name] = _call(engine, peer, checks)
            if isinstance(engine, fastres.Model):
                self.model = engine
        self.progress.update(TICKS // 2)

    def time(self, budget: timing.Budget, share: Callable[[float], object] = lambda share: None) -> None:
        """Time all engines alternately and add the results to their rows."""
        samples = timing.interleaved(self.engines, self.setting.device, budget, share)
        if samples:
            timed = _timed(self.setting, self.network, list(self.rows.values()), samples, self.limits)
            self.rows = {row.engine: row for row in timed}

    @property
    def ordered(self) -> list[Row]:
        """The rows, in the order of the setting's engines."""
        return [self.rows[peer.name] for peer in self.setting.peers if peer.name in self.rows]


def benchmark(
    setting: Setting, network: EagerResNet, limits: ceilings.Ceilings, budget: timing.Budget, progress: tqdm, keep: Keep
) -> tuple[list[Row], tuple[LayerRow, ...]]:
    """Return one row for each engine of ``setting`` and the steps of fastres. The first engine must be eager.

    ``keep`` receives the current rows and steps after each engine. The steps are timed only if fastres is included and
    correct.
    """
    progress.set_description(f"{setting.model} {dtype_name(setting.dtype)}, batch {setting.batch}")
    steps: tuple[LayerRow, ...] = ()
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        file = in_8_bit(network, setting.size, Path(folder)) if setting.dtype == torch.int8 else None
        plan = None if file is None else fastres.load(file).plan
        checks = make_checks(network, setting.batch, setting.size, setting.device, setting.dtype, plan)
        found = Comparison(setting, network, limits, progress, {}, {}, file)
        slow = [peer for peer in setting.peers if peer.slow]
        for peer in (peer for peer in setting.peers if not peer.slow):
            found.admit(peer, checks)
            keep(found.ordered, steps)
        for peer in slow:  # a slow build may be stopped or kill the process, so time the others first
            if found.engines and any(row.status == OK and row.p50_ms is None for row in found.rows.values()):
                found.time(timing.QUICK)
                keep(found.ordered, steps)
            found.admit(peer, checks)
            keep(found.ordered, steps)
        progress.set_postfix_str("timing")
        start, half = progress.n, TICKS // 2 * len(found.rows)
        found.time(budget, lambda share: progress.update(start + half * share - progress.n))
        keep(found.ordered, steps)
        if found.model is not None:
            progress.set_postfix_str("layer by layer")
            try:
                steps = layers.measure(found.model, checks.batches[0], limits)
            except FastresError as error:
                progress.write(f"fastres bench: could not time each layer: {error}", file=sys.stderr)
    return found.ordered, steps


def in_8_bit(network: EagerResNet, size: int, folder: Path) -> Path:
    """Quantize ``network`` with smooth pictures; return the file of the model in 8 bit, in ``folder``."""
    arch = network.architecture
    model = fastres.load(arch.name, network.state_dict(), num_classes=arch.num_classes)
    model.transforms = replace(model.transforms, resize=size, crop=size)
    pictures = list(pixels(smooth_images(CALIBRATION_IMAGES, size, size, CALIBRATION_SEED)))
    return fastres.quantize(model, pictures, method="max", progress=False).save(folder / "int8.safetensors")


def _call(engine: Engine, peer: Peer, checks: Checks) -> Callable[[], object]:
    x = peer.example(checks.batches[0])
    return lambda: engine(x)


def _admit(
    setting: Setting,
    peer: Peer,
    network: EagerResNet,
    quantized: Path | None,
    checks: Checks,
    eager_error: Error,
) -> tuple[Row, Error | None, Engine | None]:
    """Build ``peer``, measure its first call and check its logits. Return the engine only if it may be timed."""
    reason = peer.absent(setting.device, setting.dtype)
    if reason is not None:
        return setting.row(peer, ABSENT, reason), None, None
    x = peer.example(checks.batches[0])

    def build() -> Engine:
        in_int8 = quantized is not None and peer.build_int8 is not None
        engine = peer.build_int8(quantized, x) if in_int8 else peer.build(network, x)  # type: ignore[misc,arg-type]
        engine(x)
        if setting.device.type == "cuda":
            engine(x)  # some engines capture a graph in this call, which is part of the first call's cost
        return engine

    try:
        with environment.compilation_caches(empty=setting.cold):
            engine, seconds, growth = timing.measured(build, setting.device)
        error = relative_error(engine, peer, checks)
    # Any error that another library raises while it is built or run becomes the reason for its absence.
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
        f"{of} by {found:.2e}, but at most {most:.2e} is accepted (eager: {own:.2e})"
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
    """Return the rows with the values computed from the samples."""
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


def release(device: torch.device) -> None:
    """Discard compiled code, because Dynamo limits how often it compiles the same module code for new settings."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
