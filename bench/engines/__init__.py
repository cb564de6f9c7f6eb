"""The engines that fastres is compared with: eager PyTorch, compilers, ONNX Runtime, OpenVINO, TensorRT, JAX.

Builds each as a function of a batch. Measures and judges nothing.
"""
