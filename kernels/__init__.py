"""Triton kernels for ResNet inference: fused conv + bias + residual + ReLU, stem, head."""
