"""``fastres bench serve``: measure a server under load, beside others or at a URL."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastres.arguments import whole_number
from fastres.bench.classify import jpeg, photographs, varied
from fastres.bench.measure import environment
from fastres.bench.measure.calibration import calibrated
from fastres.bench.measure.watching import Program, watch
from fastres.bench.report.results import check_folder, significant, write_json, write_whole
from fastres.classification.driving import every
from fastres.commands.environment import installed_version
from fastres.errors import FastresError, InputError
from fastres.extras import check_dependencies
from fastres.network.architectures import get_architecture
from fastres.terminal import progress_bar, wrote

from . import figures, tables
from .generator import Job, Outcome, poisson
from .servers import FASTRES, NAMES, Running, started

NAME = "serve"
PHOTO = (500, 375)  # width × height, as most of ImageNet's
DISTINCT = 300
OFFLINE = 1500  # images
CLIENTS = 32  # that ask at a time when the capacity is measured
_FALLBACK_S = 60.0  # after which a request is given up


class Bench:
    """What is the same for all servers: the photographs, the weights, the settings."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.photos = scratch / "photos"
        self.best: dict[str, dict[int, int]] = {}  # of each server and photograph, as the first answer said

    def make(self) -> None:
        """Write the photographs, and the weights if none are given."""
        generator, sources = random.Random(0), photographs()
        self.photos.mkdir()
        for index in progress_bar(range(DISTINCT), desc="Making photographs", unit="image", disable=None):
            data = jpeg(varied(sources[index % len(sources)], PHOTO, generator))
            (self.photos / f"{index:04}.jpg").write_bytes(data)
        if self.options.weights is None and not self.options.url:
            self.options.weights = str(self.scratch / "weights.pth")
            torch.save(calibrated(get_architecture(self.options.model)).state_dict(), self.options.weights)

    def send(self, server: Running, what: str, seconds: float, **given: Any) -> tuple[list[Outcome], dict[str, float]]:
        """Have the generator send a load; show how long it takes."""
        job = Job(
            url=server.url, folder=str(self.photos), form=server.form, timeout=_FALLBACK_S,
            api_key=self.options.api_key, seconds=seconds, **given,
        )  # fmt: skip
        asked, answered = self.scratch / "job.json", self.scratch / "outcomes.json"
        asked.write_text(json.dumps(asdict(job)))
        command = [sys.executable, "-m", "fastres.bench.serve.generator", str(asked), str(answered)]
        with _clock(f"{server.name}, {what}", seconds):
            ended = subprocess.run(command, check=False, capture_output=True, text=True)
        if ended.returncode:
            raise FastresError(f"The load generator failed: {ended.stderr.strip()[-1000:]}")
        document = json.loads(answered.read_text())
        return [Outcome(**each) for each in document["outcomes"]], document["cost"]

    def measured(self, server: Running, what: str, seconds: float, **given: Any) -> dict[str, Any]:
        """Send a load and return its numbers."""
        before = server.metrics()
        with server.watched(often=given.get("clients") != 1):
            outcomes, cost = self.send(server, what, seconds, **given)
            time.sleep(0.5)  # the memory after the last answer
        found = figures.summary(outcomes, seconds)
        memory = server.memory_mb
        return {
            "load": what,
            **found,
            "wrong": figures.disagreements(outcomes, self.best.setdefault(server.name, {})),
            "batches": figures.between(before, server.metrics()),
            "memory_mb": {"first": memory[0], "most": max(memory), "last": memory[-1]} if memory else None,
            "generator_s_per_request": significant(cost["processor_s"] / max(len(outcomes), 1), 3),
            "others_cores": significant(server.others_cores, 3),
            "doubts": figures.warnings(found, server.others_cores),
        }

    def offline(self) -> float | None:
        """Return the images per second of ``fastres classify`` between 10 % and 90 % of its rows."""
        folder = self.scratch / "offline"
        if not folder.exists():
            folder.mkdir()
            for index in range(OFFLINE):
                (folder / f"{index:05}.jpg").hardlink_to(self.photos / f"{index % DISTINCT:04}.jpg")
        with tempfile.TemporaryDirectory(dir=self.scratch) as output:
            arguments = [str(folder), "-o", f"{output}/table.parquet", "--model", self.options.model, "--weights",
                         self.options.weights, "--device", "cpu", "--json"]  # fmt: skip
            with (
                progress_bar(total=OFFLINE, desc="fastres classify", unit="image", disable=None) as bar,
                closing(Program(arguments, sorted(os.sched_getaffinity(0)), {})) as program,
            ):
                watch([program], bar.update)
                return program.bar.steady_rate()

    def round(self, number: int) -> dict[str, Any]:
        """Measure the offline rate and all servers once."""
        options = self.options
        found: dict[str, Any] = {"offline_images_per_s": self.offline(), "servers": {}}
        names = options.servers[number % len(options.servers) :] + options.servers[: number % len(options.servers)]
        ready: dict[str, float] = {}
        for name in sorted(names, key=lambda name: name != FASTRES):  # the loads are shares of fastres's capacity
            with started(name, options.model, options.weights, options.serve) as server:
                self.send(server, "warming up", 3, clients=4)
                one = self.measured(server, "one at a time", options.seconds, clients=1)
                full = self.measured(server, f"{CLIENTS} clients", options.seconds, clients=CLIENTS)
                ready.setdefault("capacity", _capacity(full))
                loads = [
                    self.measured(
                        server, f"{load:g} %", options.seconds,
                        times=poisson(load / 100 * ready["capacity"], options.seconds, seed=number),
                    )
                    for load in options.loads
                ]  # fmt: skip
                found["servers"][name] = {"one_at_a_time": one, "saturated": full, "loads": loads}
        return found

    def at_url(self) -> dict[str, Any]:
        """Measure the server at ``--url``."""
        options = self.options
        server = Running("server", options.url.rstrip("/"), api_key=options.api_key)
        one = self.measured(server, "one at a time", options.seconds, clients=1)
        full = self.measured(server, f"{CLIENTS} clients", options.seconds, clients=CLIENTS)
        rates = options.rates or [load / 100 * _capacity(full) for load in options.loads]
        loads = [
            self.measured(server, f"{rate:g}/s", options.seconds, times=poisson(rate, options.seconds, seed=0))
            for rate in rates
        ]
        return {"offline_images_per_s": None, "servers": {"server": {
            "one_at_a_time": one, "saturated": full, "loads": loads}}}  # fmt: skip


def _capacity(full: dict[str, Any]) -> float:
    """Return the images per second of a server that always had work. Raise ``FastresError`` if there were none."""
    if not full["images_per_s"]:
        statuses = ", ".join(f"{count:,} {status}" for status, count in full["statuses"].items()) or "none"
        raise FastresError(f"No request was answered with status 200; the outcomes were: {statuses}")
    return float(full["images_per_s"])


@contextmanager
def _clock(what: str, seconds: float) -> Iterator[None]:
    """Show a bar over about ``seconds``."""
    with (
        progress_bar(total=round(seconds), desc=what, unit="s", disable=None) as bar,
        every(1.0, lambda: bar.update(bar.n < bar.total)),
    ):
        yield


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one round whose numbers are the medians of those of all; counts are added up."""
    first = rounds[0]
    servers = {}
    for name in first["servers"]:
        each = [one["servers"][name] for one in rounds]
        loads = [[one["loads"][index] for one in each] for index in range(len(each[0]["loads"]))]
        saturated = _median([one["saturated"] for one in each])
        servers[name] = {
            "capacity_images_per_s": saturated["images_per_s"],
            "one_at_a_time": _median([one["one_at_a_time"] for one in each]),
            "saturated": saturated,
            "loads": [_median(level) for level in loads],
        }
    rates = [one["offline_images_per_s"] for one in rounds]
    return {"offline_images_per_s": None if None in rates else significant(statistics.median(rates), 4),
            "servers": servers}  # fmt: skip


_COUNTS = ("requests", "no_answer", "wrong", "batches", "batches_up_to", "statuses")


def _median(values: Sequence[Any], key: str = "", adds: bool = False) -> Any:
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], dict):
        names = dict.fromkeys(name for value in known for name in value)
        return {
            name: _median([value[name] for value in known if name in value], name, adds or name in _COUNTS[-2:])
            for name in names
        }
    if isinstance(known[0], list):
        return [each for value in known for each in value]
    if isinstance(known[0], (int, float)):
        adds = adds or (key in _COUNTS and isinstance(known[0], int))
        return sum(known) if adds else significant(statistics.median(known), 5)
    return known[0]


def main(arguments: Sequence[str] | None = None, program: str = "python -m bench.serve") -> int:
    """Measure, print tables, and write ``serve.json``, ``serve.md``, ``serve.svg`` and ``serve.png`` to ``--out``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser(program).parse_args(arguments)
    _check_packages(options)
    check_folder(options.out)
    rounds = whole_number(options.rounds, "--rounds")
    if options.seconds <= 0 or any(load <= 0 for load in [*options.loads, *options.rates]):
        raise InputError("--seconds, --loads and --rates must be above 0")
    if FASTRES not in options.servers:
        options.servers = [FASTRES, *options.servers]  # the loads are shares of its capacity
    options.loads.sort()  # a server may still have work after one
    options.rates.sort()
    scratch = Path(tempfile.mkdtemp(prefix="fastres-serve-"))
    given = " ".join([program, *arguments])
    weights = options.weights or ("those of the server" if options.url else "random, calibrated")
    facts = environment.describe(torch.device("cpu"), given, weights, tf32=False, cold=False, ceilings={})
    packages = ("litserve", "fastapi", "uvicorn", "aiohttp", "simplejpeg", "pillow")
    try:
        bench = Bench(options, scratch)
        bench.make()
        size = round(statistics.mean(path.stat().st_size for path in bench.photos.iterdir()))
        measured = [bench.at_url()] if options.url else [bench.round(number) for number in range(rounds)]
    finally:
        shutil.rmtree(scratch)
    found = {
        "model": options.model if not options.url else options.url,
        "environment": {**facts, **{package: installed_version(package) for package in packages}},
        "settings": {"seconds": options.seconds, "rounds": rounds, "clients": CLIENTS, "photo": list(PHOTO),
                     "photo_bytes": size, "distinct": DISTINCT, "serve": options.serve},
        **medians(measured),
        "same_best_class": figures.agreement(bench.best, FASTRES),
        "rounds": measured,
    }  # fmt: skip
    text = tables.text(found)
    files: list[tuple[str, Callable[[], bytes]]] = [
        ("md", lambda: f"```text\n{text}\n```\n".encode()),
        ("svg", lambda: tables.drawing(found, "svg")),
        ("png", lambda: tables.drawing(found, "png")),
    ]
    write_json(options.out / f"{NAME}.json", found)
    for ending, content in files:
        write_whole(options.out / f"{NAME}.{ending}", content())
        wrote(options.out / f"{NAME}.{ending}")
    print(text)
    print(f"Wrote {options.out / NAME}.json, .md, .svg and .png")
    return 0


def _check_packages(options: argparse.Namespace) -> None:
    """Raise ``MissingDependencyError`` if a package is not installed."""
    servers = () if options.url else ("litserve", "prometheus_client")
    check_dependencies("bench serve", ["aiohttp", *servers, "matplotlib"], "serve,bench")
    check_dependencies("bench serve", ["sklearn", "skimage"], "demo")  # have the photographs


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Measure fastres serve under load, beside other servers: " + tables.names(NAMES) + ".",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="output folder for serve.json, serve.md, serve.svg and serve.png")
    add("--model", default="resnet50", help="a name from 'fastres list' (default: %(default)s)")
    add("--weights", help="path of a checkpoint (default: random, calibrated)")
    add("--servers", nargs="+", choices=NAMES, default=list(NAMES), help="(default: all)")
    add("--loads", nargs="+", type=float, default=[10, 50, 90, 200], metavar="PERCENT",
        help="of the capacity of fastres (default: 10 50 90 200)")  # fmt: skip
    add("--seconds", type=float, default=20, metavar="S", help="of each load (default: %(default)g)")
    add("--rounds", type=int, default=3, help="through all servers (default: %(default)s)")
    add("--serve", nargs=argparse.REMAINDER, default=[], metavar="OPTION", help="options of fastres serve; comes last")
    add("--url", help="load this server instead of starting some")
    add("--rates", nargs="+", type=float, default=[], metavar="N", help="with --url: requests per second")
    add("--api-key", help="with --url: the key that the server wants")
    return parser
