"""Why residual networks: ``python -m bench.study {degradation,vanishing,shattering,shortcuts,all} --out DIR``.

Each study measures one of the observations that motivate residual networks and writes figures, CSV files and a page. An
interrupted run resumes where it stopped. A study that was measured with the same settings is not measured again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fastres.errors import FastresError
from fastres.program import run_program

from . import degradation, shattering, shortcuts, vanishing
from .common import DEEPER, QUICK, Settings
from .figures import drawing
from .report import measured, write_page, write_study

STUDIES = {study.name: study for study in (degradation.STUDY, vanishing.STUDY, shattering.STUDY, shortcuts.STUDY)}
OUT = Path("out/study")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__.replace("``", ""))
    parser.add_argument("study", choices=[*STUDIES, "all"], help="the study to run")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder to write to (default {OUT})")
    parser.add_argument("--quick", action="store_true", help="run a small version: under two minutes on two cores")
    parser.add_argument("--data", type=Path, help="cifar-10-batches-py, to train on CIFAR-10 (default: the digits)")
    parser.add_argument(
        "--deep", type=int, choices=DEEPER, default=Settings.deep, help="depth compared with 20 (default %(default)s)"
    )
    parser.add_argument("--seeds", type=_positive, help=f"networks of each kind (default {Settings.seeds}; quick 1)")
    parser.add_argument("--epochs", type=_positive, help=f"training epochs (default {Settings.epochs}; quick 5)")
    parser.add_argument(
        "--workers", type=_positive, default=os.cpu_count() or 1, help="processes (default: one per core)"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure again even if there are results for these settings"
    )
    parser.add_argument("--docs", type=Path, help="also write the page as Markdown into this file")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} was given; give 1 or more")
    return value


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings of the full or the quick size, with the user's choices."""
    chosen = {key: getattr(options, key) for key in ("seeds", "epochs") if getattr(options, key) is not None}
    size = {**(QUICK if options.quick else {}), **chosen}
    return Settings(options.out, data=options.data, deep=options.deep, workers=options.workers, **size)


def command_of(study: str, options: argparse.Namespace) -> str:
    """Return the command that repeats one study. It has no paths, because they differ between machines."""
    words = ["python", "-m", "bench.study", study]
    if options.quick:
        words.append("--quick")
    for name in ("deep", "seeds", "epochs"):
        value = getattr(options, name)
        if value not in (None, getattr(Settings, name)):
            words += [f"--{name}", str(value)]
    if options.data is not None:
        words += ["--data", "cifar-10-batches-py"]
    return shlex.join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Return the exit status."""
    options = _parser().parse_args(arguments)
    settings = settings_of(options)
    chosen = list(STUDIES.values()) if options.study == "all" else [STUDIES[options.study]]
    try:
        with drawing():  # fails before an hour of training if figures cannot be drawn
            settings.dataset()
        for study in chosen:
            result = measured(study, settings, command_of(study.name, options), options.again)
            write_study(study, result, settings.folder)
            print(f"{study.title}. {study.paragraph(result.data)}\n")
        page = write_page(list(STUDIES.values()), settings.folder, options.docs)
    except FastresError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    print(f"Wrote {page} and its figures and data.")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m bench.study"))
