"""Run ``python -m bench.report``."""

import sys

from fastres.program import run_program

from .show import main

sys.exit(run_program(main, "python -m bench.report"))
