"""``python -m fastres`` is the ``fastres`` command."""

import sys

from .cli import main

sys.exit(main())
