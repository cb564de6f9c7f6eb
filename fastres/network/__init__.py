"""The network as data: the architectures, and the Plan that every executor and exporter reads.

This package describes shapes, weights and the computation of each step. It does not depend on devices, kernels or
files.
"""
