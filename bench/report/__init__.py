"""Results: their file format, and the tables, charts and page that are made from it and from nothing else.

Measures nothing. ``python -m bench.report`` shows the results in folders.
"""
