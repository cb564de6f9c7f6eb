"""A pretend GPU: tensors on ``cuda:0``, streams, events and graphs, all on a CPU, to test host code that needs CUDA.

It rejects what CUDA rejects and reports races. It does not tell anything about speed.
"""
