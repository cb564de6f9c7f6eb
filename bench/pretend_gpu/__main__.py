"""``python -m bench.pretend_gpu``: run a module on a pretend GPU."""

from .cuda import main

main()
