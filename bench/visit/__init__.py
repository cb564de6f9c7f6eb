"""A visit to a GPU: tests and benchmarks on a borrowed machine. One archive brings all results back."""
