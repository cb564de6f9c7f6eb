"""A visit to a GPU: tests and benchmarks on a machine that is available for minutes. One archive has all results.

The pieces of a visit are commands of this package, each in its own process; nothing is measured in here.
"""
