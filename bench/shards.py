"""Measure how ``fastres classify --processes`` scales on a CPU, and its memory: ``python -m bench.shards``.

There are two loads: large JPEGs with a small network, where decoding takes most of the time, and small JPEGs with
ResNet-50 in float32, where the network does. Each round runs three things on each load, as programs of their own, with
one thread for each process:

- one process on one core, in each round another one
- ``--processes P`` on P cores
- P commands at once, each on a core of its own and over all images: what the machine can do at most

Each process decodes its images itself, because that is faster on one core than a worker process; see ``--workers``.
Efficiency is the rate of P processes (or commands) divided by P times the rate of one process in the same round. There
are two rates: images per second between 10 % and 90 % of the rows, and of the whole command, with its imports and the
loading of the model. All tables of a load must be the same, byte for byte. ``cores_used`` is the processor's time that
a run has used, over the time that it had its cores: less than 1 if others used them too, or if a core was idle.

Then the memory of ``--shard 1/1`` and of ``--processes P`` is sampled over ``--memory-images`` small JPEGs: all that is
resident, and without files (libraries, the list of images), which does not depend on other programs.

The images are cut from photographs that come with scikit-learn, scikit-image and matplotlib. There are as many files
as images, but many names are hard links to the same content. ``shards.json`` in ``--out`` has all figures.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastres
from fastres.arguments import whole_number
from fastres.bench.classify import Runs, jpeg, photographs, varied
from fastres.bench.measure import environment
from fastres.bench.measure.calibration import calibrated
from fastres.bench.measure.watching import Program, ended_s, level, on_cores, watch
from fastres.bench.report.results import check_folder, significant, write_json
from fastres.classification import CPU_BATCH
from fastres.classification.batches import Reading
from fastres.commands.environment import installed_version
from fastres.errors import FastresError, InputError
from fastres.executors.quota import cores_allowed, threads
from fastres.images.jpeg import FAST
from fastres.network.architectures import get_architecture
from fastres.program import run_program
from fastres.terminal import progress_bar, wrote
from fastres.text import text_table

JSON_NAME = "shards.json"
BUNDLED = "resnet20_digits"
ONE, SHARED, APART = KINDS = ("one_process", "processes", "commands")
RATES = {"steady": "10 % to 90 %", "whole": "whole command"}
VARIABLES = {"OMP_NUM_THREADS": "1"}
MEMORY_EVERY_S = 0.5
LEVELS = (0.2, 0.5, 1.0)  # shares of the rows; the growth is from the first to the last


@dataclass(frozen=True)
class Load:
    """JPEGs of ``size``, width × height, for ``model``: ``times`` as many as ``--images``, of ``distinct`` contents."""

    name: str
    model: str
    size: tuple[int, int]
    times: int
    distinct: int


LOADS = (
    Load("large JPEGs", BUNDLED, (1024, 768), 16, 384),
    Load("small JPEGs", "resnet50", (160, 120), 1, 128),
)
MANY = Load("many JPEGs", BUNDLED, (32, 32), 1, 2048)


@dataclass(frozen=True)
class Setting:
    """What is the same for all runs. ``cores`` are those of the processes, one for each."""

    scratch: Path
    cores: tuple[int, ...]
    workers: int

    @property
    def processes(self) -> int:
        return len(self.cores)


# -- the images and the models -------------------------------------------------------------------------------


def make_images(load: Load, folder: Path, count: int) -> tuple[Path, Path]:
    """Write ``count`` JPEGs, the same ones every time. Return a folder of the distinct ones, and one of all."""
    distinct, images = folder / "distinct", folder / "images"
    generator, photos, contents = random.Random(0), photographs(), min(load.distinct, count)
    distinct.mkdir(parents=True)
    images.mkdir()
    with progress_bar(total=contents + count, desc=f"Making {load.name}", unit="file", disable=None) as bar:
        for index in range(contents):
            data = jpeg(varied(photos[index % len(photos)], load.size, generator))
            (distinct / f"{index:06}.jpg").write_bytes(data)
            bar.update(1)
        for index in range(count):
            os.link(distinct / f"{index % contents:06}.jpg", images / f"{index:08}.jpg")
            bar.update(1)
    return distinct, images


def weights(model: str, scratch: Path) -> str:
    """Return the weights of ``model`` for ``--weights``: the bundled ones, or the file of a random checkpoint."""
    if model == BUNDLED:
        return "DEFAULT"
    path = scratch / f"{model}.pth"
    if not path.exists():
        torch.save(calibrated(get_architecture(model)).state_dict(), path)
    return str(path)


def alone(load: Load, distinct: Path, setting: Setting) -> dict[str, Any]:
    """Return images per second of decoding alone and of the model alone, on one core with one thread."""
    model = fastres.load(load.model, weights(load.model, setting.scratch), dtype=torch.float32, device="cpu")
    with threads(1), on_cores(setting.cores[:1]):
        runs = Runs(distinct, distinct.parent, model, Reading(CPU_BATCH, 0, model.transforms, FAST))
        decode, infer = runs.decode(), runs.infer()
    return {
        "decode_images_per_s": significant(decode, 4),
        "model_images_per_s": significant(infer, 4),
        "slower": "decoding" if decode < infer else "model",
        "decode_share_of_time": significant(infer / (decode + infer), 3),
    }


# -- efficiency ----------------------------------------------------------------------------------------------


class Tables:
    """The outputs of the runs over one folder of images, which must all be the same."""

    def __init__(self, load: Load, images: Path, count: int, setting: Setting) -> None:
        self.load, self.images, self.count, self.setting = load, images, count, setting
        self.digest = ""

    def arguments(self, output: Path, *more: str) -> list[str]:
        """Return the arguments of ``fastres classify``."""
        model, scratch = self.load.model, self.setting.scratch
        return [str(self.images), "-o", str(output), "--model", model, "--weights", weights(model, scratch), "--device",
                "cpu", "--dtype", "float32", "--batch-size", str(CPU_BATCH), "--workers", str(self.setting.workers),
                "--json", *more]  # fmt: skip

    def check(self, program: Program, output: Path) -> dict[str, Any]:
        """Return the program's report. Raises ``FastresError`` unless it has written the table of all others."""
        report = program.report
        if (report["rows"], report["errors"]) != (self.count, 0):
            raise FastresError(f"{self.load.name}: {report['rows']} rows of {self.count}, {report['errors']} errors")
        digest = hashlib.sha256(output.read_bytes()).hexdigest()
        self.digest = self.digest or digest
        if digest != self.digest:
            raise FastresError(f"{self.load.name}: the tables of two runs differ, so their speeds do not count")
        return report


def timed(kind: str, number: int, tables: Tables, tell: Callable[[int], object]) -> dict[str, Any]:
    """Run one of :data:`KINDS` once. ``number`` is that of the round."""
    setting = tables.setting
    sets: list[Sequence[int]] = [[core] for core in setting.cores]
    if kind != APART:
        sets = [setting.cores] if kind == SHARED else [sets[number % len(sets)]]
    options = ["--processes", str(setting.processes)] if kind == SHARED else []
    used = -ended_s()
    with tempfile.TemporaryDirectory(dir=setting.scratch) as folder, ExitStack() as stack:
        outputs = [Path(folder, f"{index}.parquet") for index in range(len(sets))]
        programs = []
        for output, cores in zip(outputs, sets, strict=True):
            programs.append(Program(tables.arguments(output, *options), cores, VARIABLES))
            stack.callback(programs[-1].close)
        watch(programs, tell)
        reports = [tables.check(*pair) for pair in zip(programs, outputs, strict=True)]
    used += ended_s()
    had = sum(program.seconds * len(cores) for program, cores in zip(programs, sets, strict=True))
    steady = [rate for program in programs if (rate := program.bar.steady_rate()) is not None]
    return {
        "cores": [list(cores) for cores in sets],
        "wall_s": [significant(program.seconds) for program in programs],
        "report_s": [significant(report["seconds"]) for report in reports],
        "processor_s": significant(used),
        "cores_used": significant(used / had, 3),
        "steady_images_per_s": significant(sum(steady)) if len(steady) == len(programs) else None,
        "whole_images_per_s": significant(sum(tables.count / program.seconds for program in programs)),
    }


def efficiency(run: dict[str, Any], one: dict[str, Any], rate: str, processes: int) -> float | None:
    """Return the rate of ``run`` over ``processes`` times that of ``one``; ``None`` if one of them is unknown."""
    many, single = run[f"{rate}_images_per_s"], one[f"{rate}_images_per_s"]
    return None if many is None or single is None else many / (processes * single)


def spread(values: Iterable[float | None]) -> dict[str, float | None] | None:
    """Return the median, the least and the greatest value, or ``None`` if one is unknown."""
    known = list(values)
    if not known or any(value is None for value in known):
        return None
    numbers = [value for value in known if value is not None]
    found = {"median": statistics.median(numbers), "least": min(numbers), "most": max(numbers)}
    return {name: significant(value, 4) for name, value in found.items()}


def scaling(rounds: Sequence[dict[str, Any]], processes: int) -> dict[str, Any]:
    """Return rates and efficiencies over the rounds."""
    found: dict[str, Any] = {}
    for rate in RATES:
        found[rate] = {
            "images_per_s": {kind: spread(each[kind][f"{rate}_images_per_s"] for each in rounds) for kind in KINDS},
            "efficiency": {
                kind: spread(efficiency(each[kind], each[ONE], rate, processes) for each in rounds)
                for kind in (SHARED, APART)
            },
        }
    return found


def measured(load: Load, images: int, rounds: int, setting: Setting) -> dict[str, Any]:
    """Measure a load over ``images`` images."""
    folder = setting.scratch / load.name.replace(" ", "-")
    distinct, every = make_images(load, folder, images)
    found = {"load": load.name, "model": load.model, "width": load.size[0], "height": load.size[1], "images": images,
             "alone": alone(load, distinct, setting)}  # fmt: skip
    tables, done = Tables(load, every, images, setting), []
    total = rounds * images * (2 + setting.processes)
    with progress_bar(total=total, desc=f"Timing {load.name}", unit="image", mininterval=1, disable=None) as bar:
        for number in range(rounds):
            first = number % len(KINDS)
            runs = {kind: timed(kind, number, tables, bar.update) for kind in KINDS[first:] + KINDS[:first]}
            done.append({kind: runs[kind] for kind in KINDS})
    shutil.rmtree(folder)
    return {**found, "rounds": done, "scaling": scaling(done, setting.processes)}


# -- memory --------------------------------------------------------------------------------------------------


def memory(images: int, setting: Setting) -> list[dict[str, Any]]:
    """Sample the memory of runs over ``images`` images."""
    folder = setting.scratch / "many"
    tables = Tables(MANY, make_images(MANY, folder, images)[1], images, setting)
    every = ("--shard", "1/1"), ("--processes", str(setting.processes))
    return [memory_of(options, folder / f"{options[0].strip('-')}.parquet", tables) for options in every]


def memory_of(options: Sequence[str], output: Path, tables: Tables) -> dict[str, Any]:
    """Sample the memory of a run with ``options``, and of joining the table if the run leaves it to be joined."""
    setting, images = tables.setting, tables.count
    program = ended = sampled(tables.arguments(output, *options), " ".join(options), images, setting)
    if not output.exists():
        ended = sampled(["--join", str(output), "--json"], "--join", 0, setting)
    tables.check(ended, output)
    levels = {
        kind: {f"{share:.0%}": significant(level(program.samples, kind, images, share)) for share in LEVELS}
        for kind in ("own_mb", "resident_mb")
    }
    first, *_, last = levels["own_mb"].values()
    return {
        "options": " ".join(options),
        "images": images,
        "wall_s": significant(program.seconds),
        **levels,
        "growth_mb": None if first is None or last is None else significant(last - first, 3),
        "peak_resident_mb": max(each.resident_mb for each in program.samples),
        "join_peak_resident_mb": None if ended is program else max(each.resident_mb for each in ended.samples),
        "samples": [list(each) for each in program.samples],
    }


def sampled(arguments: Sequence[str], name: str, images: int, setting: Setting) -> Program:
    """Run ``fastres classify`` on all cores and sample its memory; ``name`` is for the progress bar."""
    with (
        progress_bar(total=images, desc=f"Memory of {name}", unit="image", mininterval=1, disable=None) as bar,
        closing(Program(arguments, setting.cores, VARIABLES)) as program,
    ):
        watch([program], bar.update, MEMORY_EVERY_S)
    return program


# -- the command ---------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables, and write ``shards.json`` to ``--out``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    check_folder(options.out)
    images, rounds = whole_number(options.images, "--images"), whole_number(options.rounds, "--rounds")
    many = whole_number(options.memory_images, "--memory-images", least=0)
    processes = whole_number(options.processes, "--processes")
    workers = whole_number(options.workers, "--workers", least=0)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < processes:
        raise InputError(f"{processes} processes need a core each, on Linux; this program may use {len(cores)} cores")
    command = " ".join(["python", "-m", "bench.shards", *arguments])
    facts = environment.describe(
        torch.device("cpu"), command, "random, calibrated", tf32=False, cold=False, ceilings={}
    )
    scratch = Path(tempfile.mkdtemp(prefix="fastres-shards-"))
    setting = Setting(scratch, tuple(cores[:processes]), workers)
    found: dict[str, Any] = {
        "environment": {**facts, **{package: installed_version(package) for package in ("pyarrow", "simplejpeg")}},
        "settings": {"processes": processes, "cores": cores[:processes], "cores_allowed": cores_allowed(),
                     "workers": workers, "batch_size": CPU_BATCH, "dtype": "float32", "decoder": FAST, **VARIABLES,
                     "rounds": rounds},
    }  # fmt: skip
    try:
        found["loads"] = [measured(load, load.times * images, rounds, setting) for load in LOADS]
        found["memory"] = memory(many, setting) if many else []
    except OSError as error:
        raise FastresError(f"The images cannot be written ({error}); choose another folder with TMPDIR") from error
    finally:
        shutil.rmtree(scratch)
    write_json(options.out / JSON_NAME, found)
    wrote(options.out / JSON_NAME)
    print(summary(found))
    print(f"Wrote {options.out / JSON_NAME}")
    return 0


def summary(found: dict[str, Any]) -> str:
    """Return the results as tables."""
    count = found["settings"]["processes"]
    loads = [("load", "model", "decoding alone", "model alone", "slower")]
    speed = [("load", "images/s of", "1 process", f"{count} processes", "efficiency", f"{count} commands")]
    for each in found["loads"]:
        decode, model = (f"{each['alone'][f'{part}_images_per_s']:g}/s" for part in ("decode", "model"))
        loads.append((each["load"], each["model"], decode, model, each["alone"]["slower"]))
        for rate, title in RATES.items():
            rates, shares = (each["scaling"][rate][name] for name in ("images_per_s", "efficiency"))
            numbers = [f"{rates[kind]['median']:g}" if rates[kind] else "too few images" for kind in (ONE, SHARED)]
            speed.append((each["load"], title, *numbers, *(_range(shares[kind]) for kind in (SHARED, APART))))
    least = {
        kind: min(runs[kind]["cores_used"] for each in found["loads"] for runs in each["rounds"]) for kind in KINDS
    }
    alone = (
        f"Used of their cores, in the least run: one process {least[ONE]:.0%}, {count} processes {least[SHARED]:.0%}, "
        f"{count} commands {least[APART]:.0%}. If commands use much less than 100%, other programs disturb the figures"
    )
    texts = [text_table(loads, right=(2, 3)), text_table(speed, right=(2, 3)), alone]
    if found["memory"]:
        rows = [("options", "images", *(f"MB at {share:.0%}" for share in LEVELS), "growth", "peak with files")]
        for each in found["memory"]:
            numbers = ["too few images" if value is None else f"{value:g}" for value in
                       (*each["own_mb"].values(), each["growth_mb"], each["peak_resident_mb"])]  # fmt: skip
            rows.append((each["options"], f"{each['images']:,}", *numbers))
        texts.append(text_table(rows, right=range(1, 7)))
    return "\n\n".join(texts)


def _range(values: dict[str, float] | None) -> str:
    if values is None:
        return "too few images"
    return f"{values['median']:.1%} ({values['least']:.1%} to {values['most']:.1%})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.shards",
        description="Measure how fastres classify --processes scales on this CPU, and its memory over many images.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help=f"output folder for {JSON_NAME}")
    times = " and ".join(f"{load.times} times as many {load.name}" for load in LOADS if load.times > 1)
    add("--images", type=int, default=1000, help=f"small JPEGs, with {times} (default: %(default)s)")
    add("--rounds", type=int, default=3, help="rounds of each load (default: %(default)s)")
    add("--processes", type=int, default=2, help="processes, each on a core of its own (default: %(default)s)")
    add("--workers", type=int, default=0, help="of each process; 0: it decodes itself (default: %(default)s)")
    add("--memory-images", type=int, default=100_000, help="images of the memory test; 0: none (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m bench.shards"))
