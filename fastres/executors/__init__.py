"""Executors run a Plan: oneDNN on a CPU, Triton kernels on a GPU. They also plan memory, CUDA graphs and micro-batches.

They take a Plan and tensors, never a checkpoint, a file or an image.
"""
