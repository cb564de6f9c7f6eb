"""The ``fastres`` command, with one module for each subcommand that needs more than a few lines.

The commands read arguments, call the library and print. Outside ``fastres.bench`` and ``fastres.export``, only this
package may import these two, and only when a command runs.
"""
