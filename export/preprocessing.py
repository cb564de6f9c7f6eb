"""Write resize, centre crop and normalisation as ONNX nodes, for pictures of any size.

:class:`fastres.images.Transforms` resizes with Pillow: a triangle filter as wide as the scale (antialiased), first
along the rows and then along the columns, with rounding to whole grey levels after each pass. Both passes are linear,
so each is one matrix product here, with a filter that the graph computes from the picture's size:

    filter[i, j] = max(0, 1 − |(2j + 1)·new − (2i + 1)·size| / (2·max(size, new))),   rows normalised to sum 1

for output pixel i of ``new`` and input pixel j of ``size``. For bicubic transforms, Keys's cubic (a = −1/2) of the same
distance replaces the triangle, and grey levels outside 0..255 are clipped after each pass. Only the rows i that the
crop keeps are computed. Rows outside the resized picture are zero, so the padding is black, as in the transforms.
Centres are
compared as integers, so the weights have float32's full precision at any size. ONNX's own ``Resize`` is not used: its
antialiasing needs opset 18 and TensorRT rejects it. Every runtime has the operators used here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fastres.images.transforms import Transforms

from .builder import GraphBuilder

PREFIX = "preprocessing"
WHITE = f"{PREFIX}.white"  # the constant 255
_ROWS, _COLUMNS = 1, 2  # axes of the picture, [batch, height, width, 3]
_FLOAT = 1  # onnx.TensorProto.FLOAT, for Cast

_Node = Callable[..., str]


def add_preprocessing(builder: GraphBuilder, source: str, transforms: Transforms) -> str:
    """Add nodes from ``source``, uint8 RGB ``[batch, height, width, 3]``, to float32 ``[batch, 3, crop, crop]``."""
    return _add_normalisation(builder, add_pixels(builder, source, transforms), transforms)


def add_pixels(builder: GraphBuilder, source: str, transforms: Transforms) -> str:
    """Add nodes that resize and crop ``source``, uint8 RGB ``[batch, height, width, 3]``.

    The result is whole grey levels, float32 ``[batch, 3, crop, crop]``.
    """
    node = builder.node
    # Cast uint8 at once: TensorRT takes it only at the network's edge.
    pixels = node("Cast", [source], f"{PREFIX}.float", to=_FLOAT)
    pixels = node("Transpose", [pixels], f"{PREFIX}.planes", perm=[0, 3, 1, 2])
    filters = _Filters(builder, node("Shape", [source], f"{PREFIX}.shape"), transforms)
    rows, columns = filters.of("rows", _ROWS), filters.of("columns", _COLUMNS)  # [crop, height], [crop, width]
    columns = node("Transpose", [columns], f"{PREFIX}.columns.transposed", perm=[1, 0])
    half, white = builder.constant(f"{PREFIX}.half", 0.5), builder.constant(WHITE, 255.0)

    def whole(value: str) -> str:
        rounded = node("Floor", [node("Add", [value, half], f"{value}.shifted")], f"{value}.rounded")
        if transforms.interpolation == "bilinear":
            return rounded
        return node("Min", [node("Relu", [rounded], f"{value}.lit"), white], f"{value}.clipped")

    pixels = whole(node("MatMul", [pixels, columns], f"{PREFIX}.horizontal"))  # [batch, 3, height, crop]
    return whole(node("MatMul", [rows, pixels], f"{PREFIX}.vertical"))  # [batch, 3, crop, crop]


def _add_normalisation(builder: GraphBuilder, pixels: str, transforms: Transforms) -> str:
    """Add nodes that normalise the result of :func:`add_pixels`."""
    node = builder.node
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device="cpu").view(1, 3, 1, 1)
        for values in (transforms.mean, transforms.std)
    )
    scaled = node("Div", [pixels, WHITE], f"{PREFIX}.unit")
    centred = node("Sub", [scaled, builder.constant(f"{PREFIX}.mean", mean)], f"{PREFIX}.centred")
    return node("Div", [centred, builder.constant(f"{PREFIX}.std", std)], f"{PREFIX}.normalised")


class _Filters:
    """The nodes that compute one axis's filter, and the constants that both axes share."""

    def __init__(self, builder: GraphBuilder, shape: str, transforms: Transforms) -> None:
        self.builder = builder
        self.shape = shape
        self.zero, self.one, self.two = (
            builder.constant(f"{PREFIX}.{name}", value) for name, value in (("zero", 0), ("one", 1), ("two", 2))
        )
        self.cubic = transforms.interpolation == "bicubic"
        self.round_down = transforms.crop_rounding == "down"
        self.unit = builder.constant(f"{PREFIX}.one.float", 1.0)
        if self.cubic:
            self.pair = builder.constant(f"{PREFIX}.two.float", 2.0)
        self.resize = builder.constant(f"{PREFIX}.resize", transforms.resize)
        self.crop = builder.constant(f"{PREFIX}.crop", transforms.crop)
        self.cropped = builder.constant(f"{PREFIX}.cropped", np.arange(transforms.crop, dtype=np.int64)[:, None])
        self.sum_axis = builder.constant(f"{PREFIX}.sum.axis", [1])
        sizes = [self._size("height", _ROWS), self._size("width", _COLUMNS)]
        self.sizes = dict(zip((_ROWS, _COLUMNS), sizes, strict=True))
        self.short = builder.node("Min", sizes, f"{PREFIX}.short")

    def _size(self, name: str, axis: int) -> str:
        index = self.builder.constant(f"{PREFIX}.{name}.axis", axis)
        return self.builder.node("Gather", [self.shape, index], f"{PREFIX}.{name}", axis=0)

    def of(self, name: str, axis: int) -> str:
        """Return the filter of ``axis``, float32 ``[crop, size]``."""

        def node(op: str, inputs: list[str], output: str, **attributes: int) -> str:
            return self.builder.node(op, inputs, f"{PREFIX}.{name}.{output}", **attributes)

        def cast(value: str, output: str) -> str:
            return node("Cast", [value], output, to=_FLOAT)

        size = self.sizes[axis]
        scaled = node("Mul", [size, self.resize], "scaled")
        new = node("Div", [scaled, self.short], "new")  # the longer side is rounded down
        index = node("Add", [self.cropped, self._crop_start(name, new)], "index")  # [crop, 1]
        inputs = node("Range", [self.zero, size, self.one], "inputs")  # [size]
        here = node("Mul", [self._odd(node, index, "outputs"), size], "outputs.at")
        there = node("Mul", [self._odd(node, inputs, "inputs"), new], "inputs.at")
        apart = cast(node("Abs", [node("Sub", [there, here], "apart.signed")], "apart.whole"), "apart")
        reach = cast(node("Mul", [node("Max", [size, new], "longer"), self.two], "reach.whole"), "reach")
        distance = node("Div", [apart, reach], "distance")
        heights = self._cubic(node, distance) if self.cubic else self._hat(node, self.unit, distance, "triangle")
        below = node("Less", [index, self.zero], "below")
        kept = cast(node("And", [node("Not", [below], "above"), node("Less", [index, new], "before")], "kept"), "mask")
        weights = node("Mul", [heights, kept], "weights")  # [crop, size]
        total = node("ReduceSum", [weights, self.sum_axis], "total", keepdims=1)
        # A row outside the picture sums to zero; dividing it by one keeps it zero.
        divisor = node("Add", [total, node("Sub", [self.unit, kept], "outside")], "divisor")
        return node("Div", [weights, divisor], "filter")

    def _hat(self, node: _Node, width: str, distance: str, name: str) -> str:
        """Compute max(0, width − distance)."""
        return node("Relu", [node("Sub", [width, distance], f"{name}.signed")], name)

    def _cubic(self, node: _Node, distance: str) -> str:
        """Compute Keys's cubic: max(0, 1 − d)²·(2d − 1) + max(0, 2 − d)²·(1 − d) / 2."""
        near, far = self._hat(node, self.unit, distance, "near"), self._hat(node, self.pair, distance, "far")
        rising = node("Sub", [node("Mul", [distance, self.pair], "rising.doubled"), self.unit], "rising")
        falling = node("Div", [node("Sub", [self.unit, distance], "falling.doubled"), self.pair], "falling")
        squares = [node("Mul", [side, side], f"{name}.squared") for side, name in ((near, "near"), (far, "far"))]
        parts = [
            node("Mul", [square, slope], f"{name}.part")
            for square, slope, name in zip(squares, (rising, falling), ("near", "far"), strict=True)
        ]
        return node("Add", parts, "cubic")

    def _odd(self, node: _Node, value: str, name: str) -> str:
        """Compute 2·value + 1: twice a pixel's centre."""
        return node("Add", [node("Mul", [value, self.two], f"{name}.doubled"), self.one], f"{name}.centre")

    def _crop_start(self, name: str, new: str) -> str:
        """Compute the first row or column kept: half the surplus, rounded down or to even, or towards zero if negative.

        It is ``half + half % 2 · max(surplus, 0) % 2``, where ``half`` is the surplus over two, rounded towards zero.
        """

        def node(op: str, inputs: list[str], output: str) -> str:
            return self.builder.node(op, inputs, f"{PREFIX}.{name}.start.{output}")

        surplus = node("Sub", [new, self.crop], "surplus")
        half = node("Div", [surplus, self.two], "half")
        if self.round_down:
            return half
        odd_half = node("Mod", [half, self.two], "half.odd")
        odd = node("Mod", [node("Max", [surplus, self.zero], "positive"), self.two], "odd")
        return node("Add", [half, node("Mul", [odd_half, odd], "up")], "first")
