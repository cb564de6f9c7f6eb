"""What runs a Plan: oneDNN on a CPU, Triton kernels on a GPU, with memory, graphs and batches planned for them.

Takes a Plan and tensors; never a checkpoint, a file or an image.
"""
