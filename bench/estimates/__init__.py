"""What to expect before anything is measured: rooflines, and estimates for every known GPU.

Prints and writes what ``fastres.roofline`` computes; needs no GPU and times nothing.
"""
