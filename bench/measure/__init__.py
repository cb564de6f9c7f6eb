"""Measuring: clocks, ceilings, checks that come before a clock starts, and the comparison of engines.

Returns rows and numbers; how they are shown is in ``report/``.
"""
