"""Rooflines and estimates for every known GPU, before anything is measured.

Prints and writes the results of ``fastres.roofline``. Needs no GPU and times nothing.
"""
