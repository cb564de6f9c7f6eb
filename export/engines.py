"""Benchmark engines that run exported files.

Each ``…_engine`` function takes a model and an example batch, and returns a function from a batch to its logits. The
export is fixed to the example's shape, and runs with as many CPU threads as torch does.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres.executors.processor import has_bf16
from fastres.extras import install
from fastres.model.model import Model
from fastres.text import dtype_name

Engine = Callable[[Tensor], Tensor]


def onnxruntime_engine(model: Model, x: Tensor) -> Engine:
    """Return a function that runs ONNX Runtime on ``x``'s device, for batches of its shape and dtype.

    On CUDA the batch is bound in place and the logits stay on the GPU. Raises ``DeviceError`` if the CUDA provider does
    not start, and the errors of :func:`fastres.export.onnx.export`.
    """
    from .runtime import Session

    with tempfile.TemporaryDirectory() as folder:
        path = _exported(model, x, Path(folder))
        session = Session(path, _provider(x.device.type, x.device), threads=torch.get_num_threads())
    return lambda batch: session(batch)["logits"]


def onnxruntime_absent(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why :func:`onnxruntime_engine` is not available; ``None`` if it is."""
    if reason := _export_absent(dtype):
        return reason
    if dtype == torch.int8 and device.type != "cpu":
        return "files in 8 bit are compared only on the CPU"
    if importlib.util.find_spec("onnxruntime") is None:
        return f"onnxruntime is not installed: {install('onnx')}"
    import onnxruntime

    if device.type == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this onnxruntime has no CUDA provider; install onnxruntime-gpu instead"
    return None


def onnxruntime_tensorrt_engine(model: Model, x: Tensor) -> Engine:
    """Return a function that runs TensorRT in ONNX Runtime, and CUDA for operators that TensorRT does not support.

    Everything else is as in :func:`onnxruntime_engine`. Raises ``DeviceError`` if the TensorRT provider does not start.
    """
    from .runtime import Session

    options = {"trt_fp16_enable": "1" if x.dtype == torch.float16 else "0"}
    with tempfile.TemporaryDirectory() as folder:
        asked = [_provider("tensorrt", x.device, **options), _provider("cuda", x.device)]
        session = Session(_exported(model, x, Path(folder)), asked)
    return lambda batch: session(batch)["logits"]


def onnxruntime_tensorrt_absent(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why :func:`onnxruntime_tensorrt_engine` is not available; ``None`` if it is."""
    if device.type != "cuda":
        return "TensorRT needs an NVIDIA GPU"
    if reason := onnxruntime_absent(device, dtype):
        return reason
    import onnxruntime

    if "TensorrtExecutionProvider" not in onnxruntime.get_available_providers():
        return "this onnxruntime has no TensorRT provider; install onnxruntime-gpu and tensorrt"
    return None


def openvino_engine(model: Model, x: Tensor) -> Engine:
    """Return a function that runs OpenVINO on the CPU, tuned for latency, for batches of ``x``'s shape and dtype.

    ``model`` may be in 8 bit; what it computes in float32 stays so. In bfloat16, OpenVINO computes the float32 export
    in bfloat16, and takes batches in bfloat16.
    """
    import openvino

    from .openvino_core import compiled, core

    reduced = x.dtype == torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        graph = core().read_model(_exported(model, x.float() if reduced else x, Path(folder)))
        if reduced:
            steps = openvino.preprocess.PrePostProcessor(graph)
            steps.input().tensor().set_element_type(openvino.Type.bf16)
            graph = steps.build()
        network = compiled(graph, "bf16" if reduced else "f32")
    request = network.create_infer_request()

    def given(batch: Tensor) -> Any:
        if not reduced:
            return batch.contiguous().numpy()
        return openvino.Tensor(batch.contiguous().view(torch.int16).numpy(), list(batch.shape), openvino.Type.bf16)

    def run(batch: Tensor) -> Tensor:
        results = request.infer([given(batch)], share_inputs=True)
        return torch.from_numpy(results[network.output(0)])

    return run


def openvino_absent(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why :func:`openvino_engine` is not available; ``None`` if it is."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16, torch.int8):
        return "OpenVINO is compared only on the CPU, in float32, bfloat16 and int8"
    if dtype == torch.bfloat16 and not has_bf16():
        return "OpenVINO computes in bfloat16 only with BF16 instructions, which this processor lacks"
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed: pip install openvino"
    return _export_absent(torch.float32 if dtype == torch.bfloat16 else dtype)


def _provider(name: str, device: torch.device, **options: str) -> tuple[str, dict[str, str]]:
    """Return an ONNX Runtime provider with the options that run it on ``device``."""
    return name, {**({"device_id": str(device.index)} if device.type == "cuda" else {}), **options}


def _export_absent(dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.float16, torch.int8):
        return f"ONNX files are exported in float32, float16 and int8, not in {dtype_name(dtype)}"
    if importlib.util.find_spec("onnx") is None:
        return f"onnx is not installed: {install('onnx')}"
    return None


def _exported(model: Model, x: Tensor, folder: Path) -> Path:
    from .onnx import export

    n, _, h, w = x.shape
    path = folder / "model.onnx"
    return export(model, path, batch=n, image_size=(h, w), dtype=x.dtype, verify=False, progress=False).path
