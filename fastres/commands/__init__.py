"""The ``fastres`` command, with one module for each subcommand that needs more than a few lines.

The commands read arguments, call the library and print. They import ``fastres.bench`` and ``fastres.export`` only when
a command runs. Other packages do not import these two.
"""
