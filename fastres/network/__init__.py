"""The network as data: architectures, and the Plan that a checkpoint is folded into.

Knows shapes and weights and what each step computes; never a device, a kernel or a file.
"""
