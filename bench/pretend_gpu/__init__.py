"""A pretend GPU: tensors on ``cuda:0``, streams, events and graphs, all on a CPU, to test host code that needs CUDA.

It rejects calls that CUDA rejects and reports races. Its timings say nothing about the speed of a real GPU.
"""
