"""Measurement: timing, ceilings, the correctness checks before timing, and the comparison of engines.

The functions return rows and numbers. ``report/`` shows them.
"""
