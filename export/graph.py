"""Write a plan as an ONNX graph: one node per operation of a step, folded weights as initialisers, no tracing.

Activations are NCHW, as ONNX's operators take them, and weights KCRS. A convolution is ``Conv``, then ``Add`` if it has
a residual, then ``Relu``: runtimes fuse these three themselves. The head is ``ReduceMean`` and ``Gemm``: on the CPU,
ONNX Runtime's ``GlobalAveragePool`` adds one pixel after another and has twice the rounding error.

In float16, everything from the input (or the preprocessing) to the classifier is float16. The embedding, the logits and
the outputs computed from them are cast to float32, as the model returns them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastres.network.plan import INPUT, LOGITS, Conv, Head, Plan, Pool, SqueezeExcite, Stem, Step
from fastres.text import dtype_name
from fastres.version import __version__

from .builder import ELEMENT_TYPES, Dimension, GraphBuilder
from .errors import missing
from .metadata import EMBEDDING, SOFTMAX, TOP_K, TOP_K_INDICES, TOP_K_SCORES
from .preprocessing import add_preprocessing
from .signature import Signature, plan_value

try:
    import onnx
except ImportError as error:
    raise missing("onnx") from error


def build_model(plan: Plan, signature: Signature, metadata: Mapping[str, str], writer: type[Writer]) -> onnx.ModelProto:
    """Return the ONNX model of ``plan`` (weights in ``signature.dtype``, on the CPU), with ``metadata``.

    ``writer`` writes the graph: :class:`Writer`, or :class:`export.quantised_graph.QuantisedWriter` for plans in 8 bit.
    """
    model = onnx.ModelProto()
    opset = onnx.helper.make_opsetid("", signature.opset)
    model.opset_import.append(opset)
    model.ir_version = onnx.helper.find_min_ir_version_for([opset])
    model.producer_name, model.producer_version = "fastres", __version__
    model.graph.name = plan.architecture.name
    onnx.helper.set_model_props(model, dict(metadata))
    writer(GraphBuilder(model), plan, signature).write()
    return model


class Writer:
    """Add the input, the steps and the outputs of one plan to one graph."""

    def __init__(self, builder: GraphBuilder, plan: Plan, signature: Signature) -> None:
        self.builder = builder
        self.plan = plan
        self.signature = signature
        # A value that is an output takes the output's name.
        self.names = {plan.features[name]: name for name in signature.outputs if name in plan.features}

    def write(self) -> None:
        values = [plan_value(self.plan, output) for output in self.signature.outputs]
        self.names[INPUT] = self._input()
        for step in self.plan.steps_for(values):
            self._step(step)
        for output in self.signature.names:
            self._output(output)

    def _step(self, step: Step) -> None:
        if isinstance(step, Head):
            self._head(step)
        elif isinstance(step, Pool):
            self._pool(step)
        elif isinstance(step, SqueezeExcite):
            self._squeeze_excite(step)
        else:
            assert isinstance(step, (Stem, Conv))
            self._conv(step)

    def _batch(self) -> Dimension:
        return "batch" if self.signature.batch is None else self.signature.batch

    def _declared(self) -> str:
        """Declare the graph's input."""
        if self.signature.preprocessing is not None:
            return self.builder.input(INPUT, torch.uint8, (self._batch(), "height", "width", 3))
        height, width = self.signature.image_size or ("height", "width")
        return self.builder.input(INPUT, self.signature.dtype, (self._batch(), 3, height, width))

    def _input(self) -> str:
        """Declare the graph's input; return the value that the stem reads."""
        value, dtype, transforms = self._declared(), self.signature.dtype, self.signature.preprocessing
        if transforms is None:
            return value
        value = add_preprocessing(self.builder, value, transforms)
        if dtype == torch.float32:
            return value
        return self.builder.node("Cast", [value], f"{value}.{dtype_name(dtype)}", to=ELEMENT_TYPES[dtype])

    def _value(self, value: str) -> str:
        """Return the name under which steps read a value of the plan."""
        return self.names.get(value, value)

    def _written(self, value: str) -> str:
        """Return the name under which a step writes a value of the plan."""
        return self._value(value)

    def _weights(self, name: str, weight: torch.Tensor, bias: torch.Tensor) -> list[str]:
        constant = self.builder.constant
        bias = bias.to(self.signature.dtype)  # an ONNX operator takes one dtype throughout
        return [constant(f"{name}.weight", weight), constant(f"{name}.bias", bias)]

    def _conv(self, step: Stem | Conv) -> None:
        node = self.builder.node
        residual = step.residual if isinstance(step, Conv) else None
        relu, pool = self._has_relu(step), isinstance(step, Stem) and step.pool
        parts = ["conv"] + ["add"] * (residual is not None) + ["relu"] * relu + ["pool"] * pool
        output = self._written(step.output)
        # The last node of a step writes the step's value; the nodes before it write to names of their own.
        written = {part: output if part == parts[-1] else f"{step.name}.{part}" for part in parts}
        value = self._convolution(step, written["conv"])
        if residual is not None:
            value = node("Add", [value, self._value(residual)], written["add"])
        if relu:
            value = node("Relu", [value], written["relu"])
        if pool:
            self._max_pool(value, written["pool"])

    def _has_relu(self, step: Stem | Conv) -> bool:
        return step.relu if isinstance(step, Conv) else True

    def _convolution(self, step: Stem | Conv, output: str) -> str:
        _, r, s, _ = step.weight.shape
        return self.builder.node(
            "Conv",
            [self._value(step.input), *self._weights(step.name, step.weight.permute(0, 3, 1, 2), step.bias)],
            output,
            kernel_shape=[r, s],
            strides=[step.stride] * 2,
            pads=[step.padding] * 4,
            group=step.groups if isinstance(step, Conv) else 1,
        )

    def _max_pool(self, value: str, output: str) -> None:
        self.builder.node("MaxPool", [value], output, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)

    def _pool(self, step: Pool) -> None:
        value, output = self._value(step.input), self._written(step.output)
        if step.mode == "max":
            self._max_pool(value, output)
            return
        # Runtimes agree on one row and one column of uncounted padding. They do not agree on ceil_mode.
        sizes = {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 1, 1]}
        self.builder.node("AveragePool", [value], output, count_include_pad=0, **sizes)

    def _squeeze_excite(self, step: SqueezeExcite) -> None:
        def node(op: str, inputs: list[str], name: str, **attributes: Any) -> str:
            return self.builder.node(op, inputs, f"{step.name}.{name}", **attributes)

        value = self._value(step.input)
        axes, attributes = self._axes(step.name, [2, 3])
        (squeeze, squeeze_bias), (expand, expand_bias) = step.parameters
        weights = self._weights(f"{step.name}.fc1", squeeze[:, :, None, None], squeeze_bias)
        mean = node("ReduceMean", [value, *axes], "mean", keepdims=1, **attributes)
        squeezed = node("Relu", [node("Conv", [mean, *weights], "fc1", kernel_shape=[1, 1])], "squeezed")
        weights = self._weights(f"{step.name}.fc2", expand[:, :, None, None], expand_bias)
        gate = node("Sigmoid", [node("Conv", [squeezed, *weights], "fc2", kernel_shape=[1, 1])], "gate")
        scaled = node("Mul", [value, gate], "scaled")
        added = node("Add", [scaled, self._value(step.residual)], "add")
        self.builder.node("Relu", [added], self._written(step.output))

    def _head(self, step: Head) -> None:
        node, outputs = self.builder.node, self.signature.outputs
        inputs, attributes = self._axes(step.name, [2, 3])
        inputs = [self._value(step.input), *inputs]
        pooled = self._returned(
            "ReduceMean", inputs, "head.mean", EMBEDDING, EMBEDDING in outputs, keepdims=0, **attributes
        )
        if all(plan_value(self.plan, output) != LOGITS for output in outputs):
            return
        weights = self._weights(step.name, step.weight, step.bias)
        self._returned("Gemm", [self._classified(pooled), *weights], "head.linear", LOGITS, True, transB=1)
        if SOFTMAX in outputs or TOP_K in outputs:
            scores = node("Softmax", [LOGITS], SOFTMAX, axis=1)
            if TOP_K in outputs:
                count = self.builder.constant("top_k.count", [self._top_k()])
                node("TopK", [scores, count], (TOP_K_SCORES, TOP_K_INDICES), axis=1)

    def _classified(self, pooled: str) -> str:
        """Return the value that the classifier reads."""
        return pooled

    def _axes(self, name: str, axes: list[int]) -> tuple[list[str], dict[str, list[int]]]:
        """Return the axes of a mean as inputs and as attributes; opset 18 turned the attribute into an input."""
        if self.signature.opset >= 18:
            return [self.builder.constant(f"{name}.axes", axes)], {}
        return [], {"axes": axes}

    def _returned(self, op: str, inputs: list[str], value: str, output: str, wanted: bool, **attributes: Any) -> str:
        """Add a node. If ``wanted``, its value is also a float32 output. Return the value in the graph's own dtype."""
        if self.signature.dtype == torch.float32:
            return self.builder.node(op, inputs, output if wanted else value, **attributes)
        self.builder.node(op, inputs, value, **attributes)
        if wanted:
            self.builder.node("Cast", [value], output, to=ELEMENT_TYPES[torch.float32])
        return value

    def _top_k(self) -> int:
        return min(self.signature.top_k, self.plan.head.weight.shape[0])

    def _output(self, output: str) -> None:
        batch, head = self._batch(), self.plan.head.weight
        widths = {LOGITS: head.shape[0], SOFTMAX: head.shape[0], EMBEDDING: head.shape[1]}
        if output in widths:
            self.builder.output(output, torch.float32, (batch, widths[output]))
        elif output in (TOP_K_SCORES, TOP_K_INDICES):
            dtype = torch.int64 if output == TOP_K_INDICES else torch.float32
            self.builder.output(output, dtype, (batch, self._top_k()))
        else:
            self.builder.output(output, self.signature.dtype, (batch, *self._feature_shape(output)))

    def _feature_shape(self, output: str) -> tuple[Dimension, ...]:
        transforms, value = self.signature.preprocessing, self.plan.features[output]
        size = (transforms.crop, transforms.crop) if transforms else self.signature.image_size
        if size is not None:
            _, h, w, c = self.plan.shapes(1, *size)[value]
            return (c, h, w)
        least = self.plan.architecture.minimum_size
        channels = self.plan.shapes(1, least, least)[value][3]
        return (channels, f"{output}_height", f"{output}_width")
