"""The network as data: the architectures, and the Plan into which a checkpoint is folded.

It describes shapes, weights and what each step computes. It knows nothing about devices, kernels or files.
"""
