"""The network as data: the architectures, and the Plan that a checkpoint is folded into.

This package describes shapes, weights and the computation of each step. It does not depend on devices, kernels or
files.
"""
