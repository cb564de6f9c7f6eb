"""A thin layer over ONNX's protobuf messages, which adds nodes and constants to one graph in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import missing

try:
    import onnx
except ImportError as error:
    raise missing("onnx") from error

ELEMENT_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.int64: onnx.TensorProto.INT64,
    torch.int32: onnx.TensorProto.INT32,
    torch.uint8: onnx.TensorProto.UINT8,
    torch.int8: onnx.TensorProto.INT8,
}

Dimension = int | str


class GraphBuilder:
    """Adds nodes and constants to ``model.graph`` in place. Weights are copied only once, into the message."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[Dimension]) -> str:
        self.graph.input.append(onnx.helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], list(shape)))
        return name

    def output(self, name: str, dtype: torch.dtype, shape: Sequence[Dimension]) -> str:
        self.graph.output.append(onnx.helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], list(shape)))
        return name

    def constant(self, name: str, value: Tensor | np.ndarray | list[int] | int | float) -> str:
        """Add an initialiser of ``value``'s dtype and shape; Python ints become int64, a float float32."""
        if isinstance(value, (int, float, list)):
            value = np.asarray(value, np.float32 if isinstance(value, float) else np.int64)
        tensor = value.detach().cpu().contiguous() if isinstance(value, Tensor) else torch.from_numpy(value)
        proto = self.graph.initializer.add()
        proto.name = name
        proto.data_type = ELEMENT_TYPES[tensor.dtype]
        proto.dims.extend(tensor.shape)
        proto.raw_data = tensor.numpy().astype(tensor.numpy().dtype.newbyteorder("<"), copy=False).tobytes()
        return name

    def node(self, op: str, inputs: Sequence[str], output: str | Sequence[str], **attributes: Any) -> str:
        """Add a node, named after its first output; return that output's name."""
        outputs = [output] if isinstance(output, str) else list(output)
        self.graph.node.append(onnx.helper.make_node(op, list(inputs), outputs, name=outputs[0], **attributes))
        return outputs[0]
