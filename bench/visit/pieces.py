"""The visits as data: each is a list of pieces, the most valuable first, with an expected time and a time limit.

``first`` checks the kernels and times them with the configurations that the rules choose, then those in 8 bit, which no
rule chooses yet. ``tune`` tunes and measures the gain. ``peers`` times compilers on the same network. ``suites`` runs
the tests. ``seconds`` is the expected time of a piece on an H100 with 16 cores. A visit prints the sum before it
starts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .trials import FAMILIES

VISITS = ("first", "tune", "peers", "suites")
BUDGET = 540  # default time limit of a visit, in seconds
RULES = "tables"  # for FASTRES_WITHOUT: only the rules choose configurations

# Placeholders in commands: the folder of this run's rows, of the tuner's tables, and of the smoke test's findings.
RUN, CONFIGS, SMOKE = "{run}", "{configs}", "{smoke}"

# Files that a piece's outcome depends on. A piece runs again only if one of its files has changed.
KERNELS = (
    "kernels/*.py",
    "kernels/routing/*.py",
    "fastres/network/*.py",
    "fastres/folding/*.py",
    "fastres/executors/*.py",
)
MEASURING = (
    "bench/run.py",
    "bench/engines/*.py",
    "bench/measure/timing.py",
    "bench/measure/checking.py",
    "bench/measure/comparison.py",
)
TUNING = ("bench/tune.py", "bench/tuning/*.py", "bench/tuning/candidates/*.json", "fastres/roofline/*.py")
TABLES = ("kernels/configs/*/conv.json",)


@dataclass(frozen=True)
class Scale:
    """What to measure: a model, its image size and batches. A rehearsal uses a smaller scale."""

    model: str = "resnet50"
    size: int = 224
    batches: tuple[str, ...] = ("256", "64", "8", "1")
    dtype: str = "float16"
    others: tuple[tuple[str, str], ...] = (
        ("resnet18", "256"), ("resnet34", "256"), ("resnet101", "128"), ("resnet152", "64"),
        ("resnext50_32x4d", "128"), ("wide_resnet50_2", "128"),
    )  # fmt: skip
    dtypes: tuple[str, ...] = ("bfloat16", "float32")  # in addition to ``dtype``
    small: bool = False  # run the smoke test on tensors small enough for an interpreter


FULL = Scale()


@dataclass(frozen=True)
class Piece:
    """One command, with its expected time, its time limit, and the files that its outcome depends on.

    ``command`` is a Python module with its arguments, or a program. Consecutive pieces with the same ``together`` run
    in parallel.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    limit: int
    inputs: tuple[str, ...]
    together: str = ""
    family: str = ""  # the family of kernels under trial; later pieces leave it out unless this piece passes
    program: bool = False  # the command is a program and not a module
    needs: str = ""  # a program that must be on the PATH, or else the piece is not run
    without: str = ""  # for FASTRES_WITHOUT, in addition to the families that did not pass
    after: str = ""  # another piece: if that one runs again, this one must too
    grace: int = 0  # seconds allowed until its first output, which do not count towards the limit
    tries: int = 1  # starts allowed if it fails and time is left; for commands that resume

    def argv(self, places: dict[str, str]) -> list[str]:
        """Return the command line, with the placeholders replaced by ``places``."""
        words = [_filled(word, places) for word in self.command]
        return words if self.program else [sys.executable, "-m", *words]


def _filled(word: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        word = word.replace(name, place)
    return word


def pieces(visit: str, scale: Scale = FULL) -> list[Piece]:
    """Return the pieces of a visit. ``"all"`` has those of all four visits and the longest tests; it can take hours."""
    made = {"first": _first, "tune": _tune, "peers": _peers, "suites": _suites}
    if visit == "all":
        return list({piece.name: piece for name in VISITS for piece in made[name](scale)}.values()) + _longest()
    return made[visit](scale)


def estimate(todo: Sequence[Piece]) -> int:
    """Return the expected seconds of these pieces. Of pieces that run in parallel only the longest counts."""
    return sum(max(piece.seconds for piece in group) for group in groups(todo))


def groups(todo: Sequence[Piece]) -> list[list[Piece]]:
    """Return the pieces in order, grouped into those that run in parallel."""
    found: list[list[Piece]] = []
    for piece in todo:
        if piece.together and found and found[-1][0].together == piece.together:
            found[-1].append(piece)
        else:
            found.append([piece])
    return found


def _smoke(scale: Scale) -> list[Piece]:
    """Return one piece per family of kernels. Each has its own process, so that a crash does not affect the others."""
    small = ("--small",) if scale.small else ()
    return [
        Piece(
            f"smoke {name}", ("fastres.bench.visit.smoke", name, *small, "--out", SMOKE), 25, 20,
            (*family.inputs, "kernels/launch.py", "bench/visit/trials.py"), together="smoke", family=name, grace=20,
        )
        for name, family in FAMILIES.items()
    ]  # fmt: skip


def _bench(
    scale: Scale, batch: str, tag: str, peers: str, seconds: int, limit: int, model: str = "", dtype: str = ""
) -> Piece:
    model, dtype = model or scale.model, dtype or scale.dtype
    command = (
        "fastres.bench.run", "--device", "cuda", "--model", model, "--dtype", dtype, "--batch", batch,
        "--size", str(scale.size), "--peers", peers, "--quick", "--only-dtype", "--only-data", "--out", RUN,
    )  # fmt: skip
    return Piece(f"{tag} {model} {dtype} batch {batch}", command, seconds, limit, (*KERNELS, *MEASURING))


def _first(scale: Scale) -> list[Piece]:
    compiled = ("fastres.bench.visit.smoke", "--compile", scale.model, *scale.batches)
    found = [
        Piece("environment", ("fastres", "env", "--json"), 10, 40, ("fastres/commands/environment.py",)),
        Piece("compile", compiled, 40, 100, KERNELS),
        *_smoke(scale),
    ]
    cheap = "eager,eager_channels_last,eager_cudagraph,fastres"
    timed = [_bench(scale, batch, "rules", cheap, _scaled(batch, 18, 28), 75) for batch in scale.batches]
    found += [replace(piece, without=RULES) for piece in timed]
    if not scale.small:
        found.append(_timed("kernels in 8 bit", 120, 240, "conv_8bit", "stem_8bit", only="N256"))
    return found


def _scaled(batch: str, small: int, large: int) -> int:
    """Return the expected seconds at a batch, interpolated between a small batch and 256."""
    return small + round((large - small) * min(1.0, int(batch) / 256))


def _tune(scale: Scale) -> list[Piece]:
    found = _smoke(scale)
    for batch in _by_interest(scale.batches):
        seconds, limit = _scaled(batch, 40, 75), _scaled(batch, 70, 130)
        command = (
            "fastres.bench.tune", "--quick", "--seconds", str(limit - 15), "--model", scale.model,
            "--batch", batch, "--size", str(scale.size), "--dtype", scale.dtype, "--out", CONFIGS,
        )  # fmt: skip
        found.append(Piece(f"tune {scale.model} batch {batch}", command, seconds, limit, (*KERNELS, *TUNING), tries=3))
        bench = _bench(scale, batch, "tuned", "eager,eager_channels_last,fastres", 16, 60)
        found.append(replace(bench, inputs=(*bench.inputs, *TABLES), after=found[-1].name))
    return found


def _by_interest(batches: Sequence[str]) -> list[str]:
    """Return the most quoted batches first: the largest, the smallest, then those in between."""
    largest, *middle, smallest = batches
    return [largest, smallest, *middle]


def _peers(scale: Scale) -> list[Piece]:
    found = _smoke(scale)
    order = _by_interest(scale.batches)
    for engine, small, large, limit in (("compile", 28, 35, 90), ("compile_max_autotune", 50, 80, 160)):
        peers = f"eager,eager_channels_last,eager_cudagraph,{engine},fastres"
        timed = [_bench(scale, batch, engine, peers, _scaled(batch, small, large), limit) for batch in order]
        found += timed[-1:] if scale.small else timed
    cheap = "eager,eager_channels_last,fastres"
    for model, batch in scale.others:
        found.append(_bench(scale, batch, "others", cheap, 14, 60, model))
    found += [_bench(scale, order[-1], "others", cheap, 16, 60, dtype=dtype) for dtype in scale.dtypes]
    return found


def _tests(name: str, seconds: int, limit: int, *words: str, side_by_side: int = 1) -> Piece:
    workers = ("-n", str(side_by_side)) if side_by_side > 1 and _has_xdist() else ()
    command = ("pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *workers, *words)
    paths = tuple(f"{word}/**/*.py" if not word.endswith(".py") else word for word in words if word.startswith("tests"))
    return Piece(name, command, seconds, limit, (*KERNELS, *paths))


def _has_xdist() -> bool:
    import importlib.util

    return importlib.util.find_spec("xdist") is not None


def _suites(scale: Scale) -> list[Piece]:
    small = "from fastres.bench.visit.smoke import one_small_run; one_small_run()"
    sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", small)
    host = ("fastres.bench.measure.host", "--model", scale.model, "--out", f"{RUN}.json")
    return [
        _tests("streams, threads and graphs", 60, 120, "tests/gpu/test_graphs.py", "tests/gpu/test_models.py", "-k",
               "stream or thread or graph"),
        _tests("kernel tests", 90, 150, "tests/kernels", side_by_side=8),
        Piece("memory check", sanitizer, 60, 120, KERNELS, program=True, needs="compute-sanitizer"),
        _tests("executor tests", 75, 120, "tests/executors/test_gpu.py", side_by_side=4),
        _tests("tuner tests", 40, 90, *(f"tests/bench/{name}.py" for name in GPU_TESTS), side_by_side=4),
        Piece("host time", host, 20, 60,
              ("fastres/executors/graphs.py", "fastres/model/*.py", "bench/measure/host.py")),
        _tests("model tests", 120, 200, "tests/gpu/test_models.py", "-k", "resnet18 or resnet50", side_by_side=4),
    ]  # fmt: skip


GPU_TESTS = ("tuning/test_configurations", "tuning/test_blocks", "measure/test_layers", "measure/test_kernel_timing")


def _longest() -> list[Piece]:
    return [
        _tests("all model tests", 480, 900, "tests/gpu/test_models.py", side_by_side=4),
        _timed("kernels one by one", 300, 600, "conv", "stem", "head", "conv_8bit", "stem_8bit"),
    ]


def _timed(name: str, seconds: int, limit: int, *kernels: str, only: str = "") -> Piece:
    """Time kernels, of which there are benchmarks in ``bench/kernels``, on the layers whose names have ``only``."""
    names = [f"bench/kernels/bench_{kernel}.py" for kernel in kernels]
    command = ("pytest", "-q", *names, "-k", only, "-p", "no:cacheprovider", f"--benchmark-json={RUN}.json")
    return Piece(name, command, seconds, limit, ("kernels/*.py", "kernels/routing/*.py", *names))
