"""Compilers of PyTorch modules as engines: ``torch.compile`` in two modes, Torch-TensorRT.

Each takes a module and an example batch ``[N, 3, H, W]``, both on the device and in the dtype and memory format of
every call, and returns a function from such batches to logits ``[N, classes]``.
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
    """``torch.compile`` with weights frozen, so that Inductor folds batch norm; compiled here.

    ``mode`` is ``"default"`` or ``"max-autotune"``, which times kernels of its own against libraries' and, on a GPU,
    replays CUDA graphs. Inductor's settings hold for this compilation alone. ``fullgraph`` because Dynamo would
    otherwise fall back to eager without a word after some recompilations.
    """
    import torch._inductor.config as inductor

    compiled: Engine = torch.compile(module, dynamic=False, fullgraph=True, mode=mode)
    # Autotuning reports on every layer, at length, on standard error, in the midst of the progress bar.
    with inductor.patch(freezing=True), contextlib.redirect_stderr(io.StringIO()):
        compiled(x)
    return compiled


def torch_compile_absent(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why :func:`torch_compile` cannot be had; ``None`` where it can."""
    if device.type == "cuda":
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler on the CPU, and there is none; install g++ or clang"
    return None


def torch_tensorrt(module: nn.Module, x: Tensor) -> Engine:
    """The module as one TensorRT engine in ``x``'s dtype, replayed as a CUDA graph.

    ``require_full_compilation`` because unsupported layers would otherwise run in eager PyTorch without a word.
    """
    import torch_tensorrt

    with torch.inference_mode(False), torch.no_grad():  # torch.export takes no inference tensors
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
    """Why :func:`torch_tensorrt` cannot be had; ``None`` where it can."""
    if device.type != "cuda" or torch.version.hip:
        return "TensorRT needs an NVIDIA GPU"
    if importlib.util.find_spec("torch_tensorrt") is None:
        return "torch_tensorrt is not installed: pip install torch-tensorrt"
    return None
