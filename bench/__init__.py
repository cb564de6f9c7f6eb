"""Correctness first, then time: fastres against what else a user could pick."""
