"""ONNX files of plans in 8 bit: the kernels that runtimes choose, and each layer's integers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from fastres.images.transforms import normalised
from fastres.model.quantized import QuantizedModel
from fastres.network.plan import Conv
from fastres.quantisation.branches import residual_convolutions

onnx = pytest.importorskip("onnx")

from fastres.export import onnx as fx  # noqa: E402
from fastres.export.graph import build_model  # noqa: E402
from fastres.export.openvino_core import core  # noqa: E402
from fastres.export.quantised_graph import LARGEST_BIAS, QuantisedWriter, bias_levels  # noqa: E402
from fastres.export.quantised_verification import Layers, inputs  # noqa: E402

from .quantised import known  # noqa: E402

# Between the file's float32 input and its first integer convolution, and before the classifier.
AROUND_THE_NETWORK = {"Pad": 1, "Mul": 1, "Add": 1, "QuantizeLinear": 2, "DequantizeLinear": 1, "ReduceMean": 1}
# Convolutions and residual additions.
COUNTS = {"resnet18": (20, 8), "resnet50": (53, 16), "resnext50_32x4d": (53, 16), "resnet20_digits": (21, 9)}


def signature(model: QuantizedModel) -> fx.Signature:
    shape = {"opset": 18, "dtype": "float32", "image_size": "dynamic", "batch": "dynamic"}
    return fx.make_signature(model, **shape, preprocessing=False, outputs=("logits",), top_k=5)


def build(model: QuantizedModel) -> Any:
    return build_model(model.plan, signature(model), {}, QuantisedWriter)


def optimised_operators(path: Path, folder: Path) -> Counter[str]:
    """Return ONNX Runtime's operators after its optimisations, except those that only change the layout."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(folder / "optimised.onnx").graph.node
    return Counter(node.op_type for node in nodes if node.op_type not in ("Transpose", "MaxPool", "NhwcMaxPool"))


def openvino_kernels(path: Path) -> list[tuple[str, str]]:
    """Return the kind and the kernel of each node that OpenVINO runs."""
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core().compile_model(path, "CPU", options)
    rows = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    return [(row["layerType"].astype(str), row["primitiveType"].astype(str)) for row in rows]


def run_in_openvino(model: bytes, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core().compile_model(core().read_model(model), "CPU", options)
    read = {name for value in compiled.inputs for name in value.names}
    found = compiled({name: value for name, value in feed.items() if name in read})
    return [found[name] for name in names]


@pytest.mark.parametrize("name", COUNTS)
def test_runtimes_compute_every_convolution_and_addition_in_integers(name: str, tmp_path: Path) -> None:
    plan = known(name).model.plan
    convolutions, additions = 1 + sum(isinstance(step, Conv) for step in plan), len(residual_convolutions(plan))
    assert (convolutions, additions) == COUNTS[name]
    path = tmp_path / "model.onnx"
    onnx.save(build(known(name).model), path)
    expected = {"QLinearConv": convolutions, "QLinearAdd": additions, "QGemm": 1, **AROUND_THE_NETWORK}
    assert optimised_operators(path, tmp_path) == expected
    pytest.importorskip("openvino")
    kernels = openvino_kernels(path)
    assert [kernel for kind, kernel in kernels if kind == "Convolution" and not kernel.endswith("_I8")] == []
    kinds = Counter(kind for kind, _ in kernels)
    assert (kinds["Convolution"], kinds["FullyConnected"]) == (convolutions, 1)
    # An addition that is not part of a convolution would be one of these.
    assert kinds["Eltwise"] == kinds["Subgraph"] == 0
    assert kinds["FakeQuantize"] == 1  # the file's input


def test_pools_are_in_integers_too(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(build(known("every step").model), path)
    operators = optimised_operators(path, tmp_path)
    assert operators["QLinearAveragePool"] == 1
    # Squeeze-and-excitation is in float32.
    squeezed = sum(step.kind == "squeeze-excite" for step in known("every step").model.plan)
    assert operators["Conv"] + operators["FusedConv"] == 2 * squeezed


@pytest.mark.parametrize("name", ["resnet18", "resnext101_32x8d", "resnet20_digits", "every step"])
def test_every_level_is_within_one_of_the_reference(name: str) -> None:
    model, x = known(name).model, known(name).images[:8]
    layers = Layers(build(model), model.plan)
    assert set(layers.limits.values()) <= {1}
    expected, read = layers.expected(x)
    # The levels of the branches cover these images, so the file should have exactly what the reference has.
    assert all(np.array_equal(expected[value], read[value]) for value in read)
    assert {value for value in read if value != "pixels"} == set(model.plan.quantisation.values) - {"input"}
    given = normalised(x / 255, model.transforms.mean, model.transforms.std).numpy()
    errors = layers.errors(given, x)
    assert len(errors) == len(read) + 1  # and the logits
    assert too_large(errors) == {}
    pytest.importorskip("openvino")
    assert too_large(layers.errors(given, x, run_in_openvino)) == {}


def too_large(errors: dict[str, tuple[int, float, int]]) -> dict[str, tuple[int, float, int]]:
    return {value: error for value, error in errors.items() if error[0] > error[2]}


def test_a_branch_that_was_not_measured_costs_half_of_its_level() -> None:
    model = known("resnet18", measured=False).model
    layers = Layers(build(model), model.plan)
    assert set(layers.limits.values()) == {1, 2}
    given, x = inputs(np.random.default_rng(0), model.plan, signature(model), 2, 45, 71)
    errors = layers.errors(given, x)
    assert max(largest for largest, _, _ in errors.values()) == 2
    assert too_large(errors) == {}


def test_a_branch_beyond_its_levels_is_cut() -> None:
    """Noise is beyond the range that was measured on smooth pictures."""
    model = known("resnet18").model
    layers = Layers(build(model), model.plan)
    given, x = inputs(np.random.default_rng(0), model.plan, signature(model), 2, 224, 224)
    expected, read = layers.expected(x)
    assert any(not np.array_equal(expected[value], read[value]) for value in read)
    assert too_large(layers.errors(given, x)) == {}


def test_steps_in_float32_stay_in_float32(tmp_path: Path) -> None:
    keep = ("stem", "layer1.0.conv1", "layer2.0.conv2", "head")
    model = known("resnet20_digits", keep=keep).model
    path = tmp_path / "model.onnx"
    onnx.save(build(model), path)
    operators = optimised_operators(path, tmp_path)
    assert operators["QLinearConv"] == 21 - 3
    assert operators["Conv"] + operators["FusedConv"] == 3
    assert operators["Gemm"] == 1
    given, x = inputs(np.random.default_rng(0), model.plan, signature(model), 3, 32, 32)
    assert too_large(Layers(onnx.load(path), model.plan).errors(given, x)) == {}


def test_biases_fit_32_bits() -> None:
    weight = torch.tensor([[0, 0], [127, -3], [100, 50]], dtype=torch.int8, device="cpu")
    scale = torch.tensor([1.0, 1e-12, 0.01], dtype=torch.float32, device="cpu")
    bias = torch.tensor([0.37, -2.0, 1.5], dtype=torch.float32, device="cpu")
    levels, chosen, found, unit = bias_levels(weight, scale, bias, 0.02)
    assert (levels.dtype, found.dtype) == (torch.int8, torch.int32)
    assert int(found.abs().max()) <= LARGEST_BIAS * (1 + 2**-20)
    # A channel of zeros, whose own scale says nothing, has a fine bias.
    assert torch.allclose(found.double() * unit.double(), bias.double(), rtol=1e-6, atol=0)
    # Ordinary channels are as they were; tiny weights are rounded by less than 2⁻³⁰ of the bias for each unit of input.
    assert torch.equal(levels[2], weight[2])
    assert chosen[2] == scale[2]
    error = (levels[1].double() * chosen[1].double() - weight[1].double() * 1e-12).abs() * 0.02
    assert float(error.max()) <= 2.0 * 0.51 / LARGEST_BIAS
