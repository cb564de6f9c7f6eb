"""Inspect compiled kernels without a GPU: registers, spills, barriers, matrix instructions.

This package compiles kernels and reads their code; it launches nothing. ``python -m fastres.kernels.inspection`` prints
a table.
"""
