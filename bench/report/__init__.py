"""Benchmark results: the file format, and the tables, charts and HTML page made from result files alone.

Nothing here measures. ``python -m bench.report`` shows the results in folders.
"""
