"""The tuner (the command is ``bench/tune.py``): candidates, their trials, and the table that the tuner fills.

``kernels/routing/`` defines the meaning of a tuned table.
"""
