"""A visit to a GPU: tests and benchmarks on a borrowed machine. One archive brings all results back.

The pieces of a visit are commands of this package, each in its own process; nothing is measured in here.
"""
