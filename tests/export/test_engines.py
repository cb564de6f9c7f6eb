"""Exported files as benchmark engines."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

pytest.importorskip("onnx")

from fastres.executors.processor import has_bf16
from fastres.export import engines

from .networks import BATCHES, network

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("onnxruntime", "float32"), ("onnxruntime", "float16"), ("openvino", "float32"), ("openvino", "bfloat16")],
)
def test_engine_computes_the_logits(name: str, dtype: str) -> None:
    pytest.importorskip(name)
    known = network("resnet18")
    x = known.images.to(getattr(torch, dtype))
    if x.dtype == torch.bfloat16 and not has_bf16():
        pytest.skip("this processor has no BF16 instructions")
    assert getattr(engines, f"{name}_absent")(CPU, x.dtype) is None
    engine = getattr(engines, f"{name}_engine")(known.model, torch.zeros_like(x))
    with torch.inference_mode():
        given = (x, x.flip(0), x.contiguous(memory_format=torch.channels_last))
        straight, flipped, again = (engine(images) for images in given)
    for logits in (straight, flipped.flip(0), again):
        parts = iter(logits.split(BATCHES))
        known.check(lambda _, parts=parts: next(parts), x.dtype)


def test_absence_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert "bfloat16" in str(engines.onnxruntime_absent(CPU, torch.bfloat16))
    assert "float32" in str(engines.openvino_absent(CPU, torch.float16))
    assert "CPU" in str(engines.openvino_absent(cuda, torch.float32))
    with monkeypatch.context() as patch:
        patch.setattr(engines, "has_bf16", lambda: False)
        assert "BF16 instructions" in str(engines.openvino_absent(CPU, torch.bfloat16))
    assert engines.onnxruntime_tensorrt_absent(CPU, torch.float32) == "TensorRT needs an NVIDIA GPU"
    if not torch.cuda.is_available():
        assert "onnxruntime-gpu" in str(engines.onnxruntime_absent(cuda, torch.float32))
    real = importlib.util.find_spec
    for package in ("onnxruntime", "openvino", "onnx"):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, package, raising=False)
            patch.setattr(importlib.util, "find_spec", lambda name, gone=package: None if name == gone else real(name))
            absent = engines.openvino_absent if package == "openvino" else engines.onnxruntime_absent
            assert f"{package} is not installed" in str(absent(CPU, torch.float32))


def test_tensorrt_is_there_where_onnxruntime_has_its_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    cuda, providers = torch.device("cuda"), ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    assert "no TensorRT provider" in str(engines.onnxruntime_tensorrt_absent(cuda, torch.float16))
    assert "bfloat16" in str(engines.onnxruntime_tensorrt_absent(cuda, torch.bfloat16))
    providers.insert(0, "TensorrtExecutionProvider")
    assert engines.onnxruntime_tensorrt_absent(cuda, torch.float16) is None
