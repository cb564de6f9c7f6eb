"""A pretend GPU: tensors of ``cuda:0``, streams, events and graphs on a CPU, for host code that needs CUDA.

It allows what CUDA allows and reports races. It says nothing about speed.
"""
