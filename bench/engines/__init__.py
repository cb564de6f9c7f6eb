"""Engines that fastres is compared with: eager PyTorch, compilers, ONNX Runtime, OpenVINO, TensorRT and JAX.

Each engine is built as a function of a batch. Nothing here measures or checks.
"""
