"""PyTorch compilers as engines: ``torch.compile`` in two modes, and Torch-TensorRT.

Each takes a module and an example batch ``[N, 3, H, W]``, which have the device, dtype and memory format of every call.
Each returns a function from such batches to logits ``[N, classes]``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

Engine = Callable[[Tensor], Tensor]

DEFAULT, MAX_AUTOTUNE = "default", "max-autotune"


def torch_compile(module: nn.Module, x: Tensor, mode: str = DEFAULT) -> Engine:
    """Compile ``module`` with ``torch.compile`` and frozen weights, so that Inductor folds batch norm.

    ``mode`` is ``"default"`` or ``"max-autotune"``. The latter times Inductor's kernels against those of libraries and,
    on a GPU, replays CUDA graphs. The Inductor settings apply to this compilation only. ``fullgraph`` is set because
    Dynamo would otherwise silently fall back to eager after some recompilations.
    """
    import torch._inductor.config as inductor

    compiled: Engine = torch.compile(module, dynamic=False, fullgraph=True, mode=mode)
    # Autotuning prints long reports on every layer to standard error, which would break the progress bar.
    with inductor.patch(freezing=True), contextlib.redirect_stderr(io.StringIO()):
        compiled(x)
    return compiled


def torch_compile_absent(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why :func:`torch_compile` is not available, or ``None`` if it is."""
    if device.type == "cuda":
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler on the CPU, but none was found; install g++ or clang"
    return None


def torch_tensorrt(module: nn.Module, x: Tensor) -> Engine:
    """Compile ``module`` to one TensorRT engine in ``x``'s dtype, which is replayed as a CUDA graph.

    ``require_full_compilation`` is set because unsupported layers would otherwise silently run in eager PyTorch.
    """
    import torch_tensorrt

    with torch.inference_mode(False), torch.no_grad():  # torch.export rejects inference tensors
        example = x.clone()
        compiled: Engine = torch_tensorrt.compile(
            module,
            ir="dynamo",
            arg_inputs=[example],
            use_explicit_typing=True,
            require_full_compilation=True,
            min_block_size=1,
            disable_tf32=torch.get_float32_matmul_precision() == "highest",
        )
    torch_tensorrt.runtime.set_cudagraphs_mode(True)
    return compiled


def torch_tensorrt_absent(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why :func:`torch_tensorrt` is not available, or ``None`` if it is."""
    if device.type != "cuda" or torch.version.hip:
        return "TensorRT needs an NVIDIA GPU"
    if importlib.util.find_spec("torch_tensorrt") is None:
        return "torch_tensorrt is not installed: pip install torch-tensorrt"
    return None
