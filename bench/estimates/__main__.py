"""``python -m bench.estimates``: see :mod:`fastres.bench.estimates.rooflines`."""

import sys

from fastres.program import run_program

from .rooflines import main

sys.exit(run_program(main, "python -m bench.estimates"))
