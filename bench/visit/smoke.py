"""``python -m fastres.bench.visit.smoke FAMILY``: is a family of kernels right on this GPU, each time?

Each case runs one kernel on random tensors into memory full of NaN, compares the result with float32, and runs it again
and again: a race shows as bits that differ. Writes what it found as JSON, and exits with 1 where something is wrong. It
runs in a process of its own, since a kernel that reads where it must not takes its whole process with it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from fastres.bench.report.results import write_whole
from fastres.kernels.inspection.ahead_of_time import Compilation
from fastres.kernels.launch import INTERPRETED
from fastres.kernels.routing.cards import Gpu, gpu_of

from .trials import FAMILIES, Trial, device_of_trials, why_not

REPEATS = 20


@dataclass(frozen=True)
class Finding:
    """What became of a trial. ``problem`` is empty where it is right and the same each time."""

    name: str
    error: float | None
    limit: float
    repeats: int
    problem: str

    def __str__(self) -> str:
        return f"{self.name}: {self.problem or f'right ({self.error:.1e}), the same {self.repeats} times'}"


@torch.no_grad()
def judged(trial: Trial, repeats: int) -> Finding:
    """Run a trial, and again ``repeats`` times."""
    first = trial.run()
    error = float((first.double() - trial.truth.double()).norm() / trial.truth.double().norm())
    problem = ""
    if not error <= trial.limit:
        problem = f"off by {error:.2e}, where at most {trial.limit:.2e} is accepted"
    else:
        for repeat in range(1, repeats + 1):
            if not torch.equal(trial.run(), first):
                problem = f"run {repeat + 1} gave other bits than the first"
                break
    return Finding(trial.name, error if error == error else None, trial.limit, repeats, problem)


def compilations(gpu: Gpu, small: bool = False) -> list[Compilation]:
    """What the trials of convolutions compile."""
    from fastres.kernels.inspection.tuned_tables import Entry, compilation

    found = [
        entry for name, family in FAMILIES.items() if not why_not(name, gpu) for entry in family.layers(gpu, small)
    ]
    return [compilation(Entry(gpu, layer, config)) for layer, config in found]


def compile_ahead(model: str, batches: Sequence[int], gpu: Gpu) -> tuple[int, list[str]]:
    """Compile in parallel, into Triton's cache, what a model's rules and the smoke will launch.

    Returns how many kernels that is, and what is wrong with those that do not compile.
    """
    from fastres.executors.compilations import plan_compilations
    from fastres.kernels.inspection.parallel import in_processes
    from fastres.network.architectures import get_architecture
    from fastres.network.folding import outline

    plan = outline(get_architecture(model), torch.float16)
    items = [item for batch in batches for item in plan_compilations(plan, gpu, batch=batch)]
    items = list(dict.fromkeys([*items, *compilations(gpu)]))
    problems = in_processes(partial(_compile, gpu), items, workers=None, label="compile")
    return len(items), [f"{item.label}: {problem}" for item, problem in zip(items, problems, strict=True) if problem]


def _compile(gpu: Gpu, item: Compilation) -> str:
    """Compile one kernel; what is wrong with it, where it does not compile."""
    from fastres.kernels.inspection import pointer_kernels, tma_kernels
    from fastres.kernels.inspection.ahead_of_time import compile_for

    own = pointer_kernels._KERNELS
    try:
        kernel = own[item.kernel] if item.kernel in own else tma_kernels._kernel(item.kernel)
        compile_for(item, kernel, gpu.arch)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def one_small_run() -> None:
    """Run a small network on the GPU once in each dtype; for compute-sanitizer."""
    import fastres

    for dtype in (torch.float16, torch.float32):
        model = fastres.load("resnet18", None, dtype=dtype, device="cuda")
        print(model(torch.rand(3, 3, 67, 91, device="cuda")).sum().item())


def main(arguments: Sequence[str] | None = None) -> int:
    """Try a family; exit status 0 where all is right, 1 where something is not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m fastres.bench.visit.smoke", description="Is a family right?")
    parser.add_argument("family", nargs="?", choices=list(FAMILIES))
    parser.add_argument("--small", action="store_true", help="problems that an interpreter can work through")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out", type=Path, help="folder for FAMILY.json")
    parser.add_argument("--compile", nargs="+", metavar=("MODEL", "BATCH"), help="compile ahead of time instead")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("fastres: the smoke needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        return 2
    gpu = gpu_of(device_of_trials())
    if options.compile:
        model, *batches = options.compile
        if INTERPRETED:
            print("Kernels are interpreted: there is nothing to compile")
            return 0
        count, problems = compile_ahead(model, [int(batch) for batch in batches], gpu)
        print("\n".join([*problems, f"{count - len(problems)} of {count} kernels compiled for {gpu.name}"]))
        return 1 if problems else 0
    torch.zeros(1, device=device_of_trials())  # the GPU is there
    print(f"{options.family} on {gpu.name}", flush=True)
    findings: list[Finding] = []
    reason = why_not(options.family, gpu)
    for trial in [] if reason else FAMILIES[options.family].trials(gpu, options.small):
        findings.append(judged(trial, 2 if options.small else options.repeats))
        found = findings[-1]
        print(
            f"{found.name}: {found.problem or f'right ({found.error:.1e}), the same {found.repeats} times'}", flush=True
        )
        if options.out:
            _write(options.out, options.family, gpu, findings, "")
    if reason:
        print(f"{options.family}: not tried: {reason}")
        if options.out:
            _write(options.out, options.family, gpu, findings, reason)
    wrong = [finding for finding in findings if finding.problem]
    if wrong:
        print(f"WrongResult: {wrong[0].name} is {wrong[0].problem}", file=sys.stderr)
    return 1 if wrong else 0


def _write(folder: Path, family: str, gpu: Gpu, findings: Sequence[Finding], not_tried: str) -> None:
    found = {"family": family, "gpu": gpu.name, "not_tried": not_tried, "trials": [asdict(item) for item in findings]}
    write_whole(folder / f"{family}.json", (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
