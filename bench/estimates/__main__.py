"""``python -m bench.estimates``: see :mod:`fastres.bench.estimates.rooflines`."""

import sys

from .rooflines import main

sys.exit(main())
