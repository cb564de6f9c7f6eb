"""``python -m bench.pretend_gpu``."""

from .cuda import main

main()
