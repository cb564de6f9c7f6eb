"""Write a plan in 8 bit as an ONNX graph with QuantizeLinear and DequantizeLinear pairs (QDQ).

Every value that has a scale is rounded by a pair: uint8, one scale for the whole tensor. Weights are int8, one scale
for each output channel, and biases int32 with the scale of the sums of products, which is the scale of the input times
that of the weight. ONNX Runtime turns each convolution between pairs into ``QLinearConv``, OpenVINO into an integer
kernel. There is no ``Relu`` before a pair whose zero point is 0: its least level stands for 0 already.

ONNX Runtime adds residuals in 8 bit, so the result of a convolution is rounded before the addition too: its *branch*
(:mod:`fastres.quantisation.branches`).

A convolution in float32 reads a value in 8 bit through a ``DequantizeLinear`` of its own, with one scale for each
channel, all the same: between two values with one scale each, ONNX Runtime would round its weights to 8 bit.

A stem in 8 bit multiplies pixels. Normalised input is first turned back into pixels, after it is padded with zeros,
which become the mean colour.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastres.network.plan import POOLED, Conv, Head, Plan, Pool, Stem, Step
from fastres.network.quantisation import Quantisation, Scale
from fastres.quantisation.branches import branch_name, branch_of

from .builder import GraphBuilder
from .graph import Writer
from .preprocessing import add_pixels
from .signature import Signature

PIXELS = "pixels"  # the padded input of a stem in 8 bit
# The largest bias in units of the sums of products, which have 32 bits and are less than 2³⁰ themselves.
LARGEST_BIAS = 2**30


class QuantisedWriter(Writer):
    """Adds the pairs of a plan in 8 bit, and what a stem in 8 bit needs, to the graph of the steps."""

    def __init__(self, builder: GraphBuilder, plan: Plan, signature: Signature) -> None:
        super().__init__(builder, plan, signature)
        assert plan.quantisation is not None
        self.quantisation: Quantisation = plan.quantisation
        self.scales = dict(plan.quantisation.values)

    def _step(self, step: Step) -> None:
        if isinstance(step, Stem):
            if step.name in self.quantisation.weights:
                step = replace(step, padding=0)  # the input is padded
            if step.pool and step.output in self.scales:
                before = f"{step.output}.convolved"
                self.scales[before] = self.scales[step.output]
                self._step(replace(step, output=before, pool=False))
                step = Pool(f"{step.name}.pool", before, step.output, step.weight, step.bias, "max")
        super()._step(step)
        if step.output in self.scales:
            self._pair(self._written(step.output), step.output, self.scales[step.output])

    def _written(self, value: str) -> str:
        return f"{value}.unrounded" if value in self.scales else super()._written(value)

    def _pair(self, source: str, value: str, scale: Scale) -> str:
        """Round ``source`` to the levels of ``value``; return what they stand for."""
        node, constant = self.builder.node, self.builder.constant
        zero_point = torch.tensor(scale.zero_point, dtype=torch.uint8, device="cpu")
        parameters = [constant(f"{value}.scale", scale.scale), constant(f"{value}.zero_point", zero_point)]
        levels = node("QuantizeLinear", [source, *parameters], levels_name(value))
        return node("DequantizeLinear", [levels, *parameters], self._value(value))

    def _input(self) -> str:
        stem = self.plan.stem
        if stem.name not in self.quantisation.weights:
            return super()._input()
        node, constant, transforms = self.builder.node, self.builder.constant, self.signature.preprocessing
        mean, std = (
            torch.tensor(values, dtype=torch.float64, device="cpu").view(1, 3, 1, 1) * 255
            for values in (stem.mean, stem.std)
        )
        value = self._declared()
        pads = constant(f"{PIXELS}.pads", [0, 0, stem.padding, stem.padding] * 2)
        if transforms is None:
            padded = node("Pad", [value, pads], f"{PIXELS}.padded")
            scaled = node("Mul", [padded, constant(f"{PIXELS}.std", std.float())], f"{PIXELS}.scaled")
            pixels = node("Add", [scaled, constant(f"{PIXELS}.mean", mean.float())], f"{PIXELS}.unrounded")
        else:
            border = constant(f"{PIXELS}.border", mean.round().float())
            centred = node("Sub", [add_pixels(self.builder, value, transforms), border], f"{PIXELS}.centred")
            pixels = node("Add", [node("Pad", [centred, pads], f"{PIXELS}.padded"), border], f"{PIXELS}.unrounded")
        return self._pair(pixels, PIXELS, self.scales[stem.input])

    def _has_relu(self, step: Stem | Conv) -> bool:
        scale = self.scales.get(step.output)
        return super()._has_relu(step) and (scale is None or scale.zero_point != 0)

    def _convolution(self, step: Stem | Conv, output: str) -> str:
        if step.name not in self.quantisation.weights and step.input in self.scales:
            step = replace(step, input=self._channel_by_channel(step))
        value = super()._convolution(step, output)
        if step.name not in self.quantisation.weights or not isinstance(step, Conv) or step.residual is None:
            return value
        return self._pair(value, branch_name(step.name), branch_of(step, self.quantisation))

    def _channel_by_channel(self, step: Stem | Conv) -> str:
        """Add a DequantizeLinear for the input of a convolution in float32; return its result."""
        scale, channels = self.scales[step.input], step.weight.shape[3] * (step.groups if isinstance(step, Conv) else 1)
        value, constant = f"{step.name}.input", self.builder.constant
        scales = torch.full((channels,), scale.scale, dtype=torch.float32, device="cpu")
        zero_points = torch.full((channels,), scale.zero_point, dtype=torch.uint8, device="cpu")
        parameters = [constant(f"{value}.scale", scales), constant(f"{value}.zero_point", zero_points)]
        return self.builder.node("DequantizeLinear", [levels_name(step.input), *parameters], value, axis=1)

    def _classified(self, pooled: str) -> str:
        if self.plan.head.name not in self.quantisation.weights:
            return pooled
        return self._pair(pooled, POOLED, self.scales[POOLED])

    def _weights(self, name: str, weight: Tensor, bias: Tensor) -> list[str]:
        if name not in self.quantisation.weights:
            return super()._weights(name, weight, bias)
        node, constant = self.builder.node, self.builder.constant
        (step,) = (step for step in self.plan if step.name == name)
        source = self.scales[POOLED if isinstance(step, Head) else step.input]
        weight, scale, levels, bias_scale = bias_levels(weight, self.quantisation.weights[name], bias, source.scale)
        # Without a zero point, ONNX Runtime does not fuse the classifier.
        zeros = torch.zeros(len(scale), dtype=torch.int8, device="cpu")
        weights = [constant(f"{name}.weight.levels", weight), constant(f"{name}.weight.scale", scale)]
        weights += [constant(f"{name}.weight.zero_point", zeros)]
        biases = [constant(f"{name}.bias.levels", levels), constant(f"{name}.bias.scale", bias_scale)]
        return [
            node("DequantizeLinear", weights, f"{name}.weight", axis=0),
            node("DequantizeLinear", biases, f"{name}.bias", axis=0),
        ]


def levels_name(value: str) -> str:
    """Return the name of the levels of a plan's value in the graph."""
    return f"{value}.levels"


def bias_levels(
    weight: Tensor, weight_scale: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the levels and scales of the weight, and of the bias, int32, in units of the sums of products.

    ``scale`` is that of the input. A channel whose weights are all 0 gets a scale that expresses its bias finely. If
    weights are so small that the bias is beyond 2³⁰ units, they are rounded to coarser levels.
    """
    weight_scale, bias = weight_scale.double(), bias.double()
    largest = weight.abs().flatten(1).amax(1)
    needed = bias.abs() / (scale * LARGEST_BIAS)
    empty = torch.where(needed > 0, needed, torch.ones_like(needed))
    chosen = torch.where(largest == 0, empty, weight_scale.maximum(needed)).float()
    coarser = weight.double() * (weight_scale / chosen.double()).view(-1, *[1] * (weight.dim() - 1))
    bias_scale = chosen * torch.tensor(scale, dtype=torch.float32, device="cpu")
    levels = (bias / bias_scale.double()).round()
    return coarser.round().to(torch.int8), chosen, levels.to(torch.int32), bias_scale
