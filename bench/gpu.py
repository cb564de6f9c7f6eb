"""``make gpu``: the whole validation on this machine's GPU, in one command that can be interrupted and resumed.

Runs the pieces of :data:`PIECES` in order, each in a process of its own and under a time limit: the environment,
every kernel compiled in parallel, the kernel tests, the network tests, a memory check, the benchmark. A piece that has
passed is not run again while the code is unchanged; one that failed or ran out of time is. A family of kernels whose
own tests fail, or hang, is left out of all that follows (``FASTRES_WITHOUT``), so that the rest can still be measured.
Uses the interpreter that runs it and touches no network. Everything it writes is in one folder, the benchmark's report
in its ``report``; a short table comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from fastres.environment import environment
from fastres.kernels import dispatch, tables
from fastres.text import text_table

from .results import write_whole

ROOT = Path(__file__).resolve().parents[1]
WORKERS = os.cpu_count() or 1
STATE = "state.json"
MODELS = ("resnet50", "resnet18", "resnet34", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2")
# torch.compile's max-autotune takes minutes a batch: it is measured at the two batches that are quoted most.
FEWER = ("--without", "compile_max_autotune")
GPU_TESTS = [f"tests/bench/test_{name}.py" for name in ("tune", "block_tuning", "layers", "kernel_timing")]
LEAST_SECONDS = 20  # no piece is worth starting with less


@dataclass(frozen=True)
class Piece:
    """One command, its time limit in seconds and what may be missing for it."""

    name: str
    command: tuple[str, ...]
    limit: int
    needs: str | None = None  # a program on the PATH
    trial_of: str = ""  # a family of kernels that is left out afterwards where this piece does not pass


@dataclass(frozen=True)
class Outcome:
    """How a piece ended: ``passed``, ``failed``, ``out of time`` or ``absent``."""

    status: str
    seconds: float
    note: str
    code: str  # what the code was: a digest


def pieces(out: Path) -> list[Piece]:
    """All pieces, in order: correctness, then tuning and speed, what matters most first."""
    python = (sys.executable, "-m")
    tests = (*python, "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider")

    def side_by_side(processes: int) -> tuple[str, ...]:
        return ("-n", str(min(processes, WORKERS))) if importlib.util.find_spec("xdist") else ()

    own = {f"tests/kernels/test_{family}.py": family for family in dispatch.FAMILIES}
    ignored = [word for path in own for word in ("--ignore", path)]
    trials = [
        Piece(f"trial of {family}", (*tests, *side_by_side(8), path), 150, trial_of=family)
        for path, family in own.items()
    ]
    bench = (*python, "fastres.bench.run", "--device", "cuda")
    one_network = "from fastres.bench.gpu import one_small_run; one_small_run()"
    return [
        Piece("environment", (*python, "fastres", "env", "--json"), 60),
        Piece("compile", (*python, "fastres.bench.gpu", "--compile"), 300),
        *trials,
        Piece("kernel tests", (*tests, *side_by_side(8), "tests/kernels", *ignored), 400),
        Piece("executor tests", (*tests, *side_by_side(4), "tests/test_gpu_executor.py", *GPU_TESTS), 300),
        Piece("model tests", (*tests, *side_by_side(4), "tests/gpu"), 590),
        _tune("256", out),
        _tune("1", out),
        *_speed_pieces(bench, out, ("256", "1"), ()),
        Piece("host time", (*python, "fastres.bench.host", "--out", str(out / "host.json")), 120),
        _tune("64", out),
        _tune("8", out),
        Piece("memory check", ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9",
                               sys.executable, "-c", one_network), 300, "compute-sanitizer"),
        *_speed_pieces(bench, out, ("8,32", "64,128", "512"), FEWER),
        *_other_pieces(bench, out),
        Piece("report", (*python, "fastres.bench.report", str(out), "--out", str(out / "report")), 200),
        Piece("kernels", (*python, "pytest", "-q", "bench/kernels/bench_conv.py", "bench/kernels/bench_stem.py",
                          "bench/kernels/bench_head.py", "-p", "no:cacheprovider",
                          f"--benchmark-json={out / 'kernels.json'}"), 400),
    ]  # fmt: skip


def _tune(batch: str, out: Path) -> Piece:
    command = (sys.executable, "-m", "fastres.bench.tune", "--batch", batch, "--out", str(out / "configs"))
    return Piece(f"tune batch {batch}", command, 590)


def _speed_pieces(
    bench: Sequence[str], out: Path, batches: Sequence[str], more: Sequence[str], model: str = "resnet50",
    dtype: str = "float16",
) -> list[Piece]:  # fmt: skip
    """A benchmark a piece, each of some batches."""
    found = []
    for some in batches:
        name = f"{model} {dtype} batch {some}"
        folder = out / name.replace(" ", "_").replace(",", "-")
        given = ("--model", model, "--dtype", dtype, "--batch", some, *more, "--out", str(folder))
        found.append(Piece(name, (*bench, *given), 590))
    return found


def _other_pieces(bench: Sequence[str], out: Path) -> list[Piece]:
    """The other models, and ResNet-50 in bfloat16."""
    batches = ("1,8,32", "64,128,256,512")
    found = _speed_pieces(bench, out, batches, FEWER, dtype="bfloat16")
    for model in MODELS[1:]:
        found += _speed_pieces(bench, out, batches, (*FEWER, "--quick"), model)
    return found


def one_small_run() -> None:
    """Run a small network on the GPU once in each dtype; for compute-sanitizer."""
    import fastres

    for dtype in (torch.float16, torch.float32):
        model = fastres.load("resnet18", None, dtype=dtype, device="cuda")
        print(model(torch.rand(3, 3, 67, 91, device="cuda")).sum().item())


def compile_all() -> None:
    """Compile in parallel, into Triton's cache, what the tests and the benchmark will launch first."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from tqdm import tqdm

    jobs = [(model, dtype, batch) for model in ("resnet50", "resnet18", "resnext50_32x4d")
            for dtype in (torch.float16, torch.bfloat16) for batch in (1, 8, 64, 256)]  # fmt: skip
    with ProcessPoolExecutor(min(8, WORKERS), mp_context=get_context("spawn")) as pool:
        for _ in tqdm(pool.map(_warm, jobs), total=len(jobs), desc="compile", unit="network"):
            pass


def _warm(job: tuple[str, torch.dtype, int]) -> None:
    import fastres

    name, dtype, batch = job
    fastres.load(name, None, dtype=dtype, device="cuda").warmup(batch)


def code_digest() -> str:
    """A digest of all code and configuration that the pieces run."""
    digest = hashlib.sha256()
    for folder in ("fastres", "kernels", "bench", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json") and "results" not in path.parts:
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_piece(piece: Piece, out: Path, code: str, without: Sequence[str] = ()) -> Outcome:
    """Run one piece ``without`` some families of kernels; its output goes to ``<name>.log`` in ``out``."""
    log = out / f"{piece.name.replace(' ', '_')}.log"
    if piece.needs and not shutil.which(piece.needs):
        return Outcome("absent", 0.0, f"{piece.needs} is not installed", code)
    start = time.monotonic()
    tuned = {**os.environ, tables.VARIABLE: str(out / "configs")}  # what the tuner wrote, and the package's own tables
    if without:
        tuned[dispatch.WITHOUT] = ",".join(without)
    with log.open("wb") as file:
        process = subprocess.Popen(
            piece.command, cwd=ROOT, env=tuned, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "passed" if process.wait(piece.limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(status, round(time.monotonic() - start, 1), _last_line(log), code)


def _last_line(log: Path) -> str:
    """The last line of a log that says something, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    lines = [line.strip(" =") for line in re.split(r"[\r\n]+", text) if line.strip(" =")]
    return lines[-1][:100] if lines else ""


def failed_trial(outcome: Outcome | None, code: str) -> bool:
    """Whether a trial of this very code has not passed."""
    return outcome is not None and outcome.code == code and outcome.status != "passed"


def read_state(out: Path) -> dict[str, Outcome]:
    """Outcomes of earlier runs in ``out``; none where there is no readable record."""
    try:
        return {name: Outcome(**entry) for name, entry in json.loads((out / STATE).read_text()).items()}
    except (OSError, ValueError, TypeError):
        return {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what has not passed yet; exit status 1 where a piece failed or ran out of time, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Validate and measure on a GPU.")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="where results go (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="PIECE", help="run these pieces, also where they passed before")
    parser.add_argument("--copy", type=Path, metavar="DIR", help="copy what is in --out here after each piece")
    parser.add_argument("--budget", type=int, metavar="S", help="stop after this many seconds; run again to go on")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("fastres: make gpu needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        return 2
    if options.compile:
        compile_all()
        return 0
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    state, code, start = read_state(out), code_digest(), time.monotonic()
    todo = pieces(out)
    for index, piece in enumerate(todo, start=1):
        done = state.get(piece.name)
        if options.only and piece.name not in options.only:
            continue
        if not options.only and done and done.code == code and done.status in ("passed", "absent"):
            continue
        if options.budget:
            left = options.budget - (time.monotonic() - start)
            if left < LEAST_SECONDS:
                break
            piece = replace(piece, limit=min(piece.limit, int(left)))
        print(f"[{index}/{len(todo)}] {piece.name} (at most {piece.limit} s) …", flush=True)
        without = [other.trial_of for other in todo if other.trial_of and failed_trial(state.get(other.name), code)]
        state[piece.name] = run_piece(piece, out, code, [] if piece.trial_of else without)
        write_whole(out / STATE, json.dumps({k: asdict(v) for k, v in state.items()}, indent=1).encode())
        write_whole(out / "environment.json", json.dumps(environment(), indent=1).encode())
        if options.copy:
            shutil.copytree(out, options.copy, dirs_exist_ok=True)
        print(f"    {state[piece.name].status} in {state[piece.name].seconds} s", flush=True)
    rows = [("piece", "status", "seconds", "code", "last line")]
    for piece in todo:
        found = state.get(piece.name)
        if found is None:
            rows.append((piece.name, "not run", "", "", ""))
        else:
            stamp = "this" if found.code == code else "older"
            rows.append((piece.name, found.status, f"{found.seconds:.0f}", stamp, found.note))
    print(text_table(rows, right=(2,)))
    print(f"{torch.cuda.get_device_name()}; everything is in {out}")
    good = ("passed", "absent")
    return 0 if all(name.name in state and state[name.name].status in good for name in todo) else 1


if __name__ == "__main__":
    sys.exit(main())
