"""What the compiler makes of the kernels, without a GPU: registers, spills, barriers, matrix instructions.

Compiles kernels and reads their code; launches nothing. ``python -m fastres.kernels.inspection`` prints a table.
"""
