"""The parts of the tuner (``bench/tune.py``): candidates, their trials, and the table as it grows.

What a tuned table means is in ``kernels/routing/``.
"""
