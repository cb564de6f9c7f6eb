"""``python -m fastres.bench.visit.smoke FAMILY``: check that a family of kernels gives correct, repeatable results.

Each trial runs one kernel on random tensors, with an output full of NaN, and compares the result with float32. Then it
repeats the run: a race shows up as different bits. The findings are written as JSON. The exit status is 1 if a result
is wrong, and 69 if no kernel of the family can run here, so that nothing was tested. Run it in its own process, because
an illegal memory access by a kernel ends the whole process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from fastres.bench.report.results import write_json
from fastres.kernels.inspection.ahead_of_time import Compilation
from fastres.kernels.launch import INTERPRETED
from fastres.kernels.routing.cards import Gpu, gpu_of

from .running import NOT_TRIED
from .trials import FAMILIES, Trial, device_of_trials, why_not

REPEATS = 20


@dataclass(frozen=True)
class Finding:
    """The result of a trial. ``problem`` is empty if the result is correct and the same each time."""

    name: str
    error: float | None
    limit: float
    repeats: int
    problem: str

    def __str__(self) -> str:
        return f"{self.name}: {self.problem or f'correct (error {self.error:.1e}), {self.repeats} repeats identical'}"


@torch.no_grad()
def judged(trial: Trial, repeats: int) -> Finding:
    """Run a trial once, then ``repeats`` more times."""
    first = trial.run()
    error = float((first.double() - trial.truth.double()).norm() / trial.truth.double().norm())
    problem = ""
    if not error <= trial.limit:
        problem = f"off by {error:.2e} (accepted: at most {trial.limit:.2e})"
    else:
        for repeat in range(1, repeats + 1):
            if not torch.equal(trial.run(), first):
                problem = f"not repeatable: run {repeat + 1} differs from the first"
                break
    return Finding(trial.name, error if error == error else None, trial.limit, repeats, problem)


def compilations(gpu: Gpu, small: bool = False) -> list[Compilation]:
    """Return the compilations that the trials of convolutions need."""
    from fastres.kernels.inspection.tuned_tables import Entry, compilation

    found = [
        entry
        for name, family in FAMILIES.items()
        if not why_not(name, gpu, small)
        for entry in family.layers(gpu, small)
    ]
    return [compilation(Entry(gpu, layer, config)) for layer, config in found]


def compile_ahead(model: str, batches: Sequence[int], gpu: Gpu) -> tuple[int, list[str]]:
    """Compile, in parallel and into Triton's cache, the kernels that a model and the smoke test will launch.

    Return the number of kernels, and a message for each one that does not compile.
    """
    from fastres.executors.compilations import plan_compilations
    from fastres.folding.build import outline
    from fastres.kernels.inspection.parallel import in_processes
    from fastres.network.architectures import get_architecture

    plan = outline(get_architecture(model), torch.float16)
    items = [item for batch in batches for item in plan_compilations(plan, gpu, batch=batch)]
    items = list(dict.fromkeys([*items, *compilations(gpu)]))
    problems = in_processes(partial(_compile, gpu), items, workers=None, label="compile")
    return len(items), [f"{item.label}: {problem}" for item, problem in zip(items, problems, strict=True) if problem]


def _compile(gpu: Gpu, item: Compilation) -> str:
    """Compile one kernel. Return the error if it does not compile, else an empty string."""
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
    """Run a small network on the GPU once per dtype, for compute-sanitizer."""
    import fastres

    for dtype in (torch.float16, torch.float32):
        model = fastres.load("resnet18", None, dtype=dtype, device="cuda")
        print(model(torch.rand(3, 3, 67, 91, device="cuda")).sum().item())


def main(arguments: Sequence[str] | None = None) -> int:
    """Test a family of kernels.

    Return exit status 0 if all results are correct, 1 if not, 2 without a GPU, and ``NOT_TRIED`` if the family cannot
    run on it.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fastres.bench.visit.smoke", description="Check a family of kernels on this GPU."
    )
    parser.add_argument("family", nargs="?", choices=list(FAMILIES), help="the family to test")
    parser.add_argument("--small", action="store_true", help="use problems small enough for Triton's interpreter")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="repeats of each trial (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for FAMILY.json")
    parser.add_argument("--compile", nargs="+", metavar=("MODEL", "BATCH"), help="only compile a model's kernels")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("fastres: the smoke test needs a CUDA GPU, but torch finds none on this machine", file=sys.stderr)
        return 2
    gpu = gpu_of(device_of_trials())
    if options.compile:
        model, *batches = options.compile
        if INTERPRETED:
            print("Kernels are interpreted, so there is nothing to compile")
            return 0
        count, problems = compile_ahead(model, [int(batch) for batch in batches], gpu)
        print("\n".join([*problems, f"{count - len(problems)} of {count} kernels compiled for {gpu.name}"]))
        return 1 if problems else 0
    torch.zeros(1, device=device_of_trials())  # initialises the GPU before the first output
    print(f"{options.family} on {gpu.name}", flush=True)
    findings: list[Finding] = []
    if reason := why_not(options.family, gpu, options.small):
        if options.out:
            _write(options.out, options.family, gpu, findings, reason)
        print(f"{options.family}: not tested: {reason}")
        return NOT_TRIED
    for trial in FAMILIES[options.family].trials(gpu, options.small):
        findings.append(judged(trial, 2 if options.small else options.repeats))
        print(findings[-1], flush=True)
        if options.out:
            _write(options.out, options.family, gpu, findings, "")
    wrong = [finding for finding in findings if finding.problem]
    if wrong:
        print(f"WrongResult: {wrong[0].name}: {wrong[0].problem}", file=sys.stderr)
    return 1 if wrong else 0


def _write(folder: Path, family: str, gpu: Gpu, findings: Sequence[Finding], not_tried: str) -> None:
    found = {"family": family, "gpu": gpu.name, "not_tried": not_tried, "trials": [asdict(item) for item in findings]}
    write_json(folder / f"{family}.json", found)


if __name__ == "__main__":
    sys.exit(main())
