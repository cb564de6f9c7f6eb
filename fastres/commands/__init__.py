"""The ``fastres`` command, one module for each subcommand that needs more than a few lines.

Reads arguments, calls the library and prints. The only place that may import ``fastres.bench`` and
``fastres.export``, and only when a command runs.
"""
