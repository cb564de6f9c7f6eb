"""``python -m fastres`` is the ``fastres`` command."""

import sys

from fastres.commands.cli import main

sys.exit(main())
