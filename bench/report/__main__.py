"""Run ``python -m bench.report``."""

import sys

from .show import main

sys.exit(main())
