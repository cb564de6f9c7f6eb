"""``python -m bench.serve``."""

from __future__ import annotations

import sys

from fastres.program import run_program

from .command import main

if __name__ == "__main__":
    sys.exit(run_program(main, "python -m bench.serve"))
