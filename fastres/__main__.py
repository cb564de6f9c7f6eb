"""Run the ``fastres`` command with ``python -m fastres``."""

import sys

from fastres.commands.cli import main

sys.exit(main())
