"""The steps of a :class:`~fastres.network.plan.Plan`: their computation, inputs, outputs and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from fastres.text import dtype_name

Shape = tuple[int, ...]


def conv_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Return the output height or width of a convolution or pooling window."""
    return (size + 2 * padding - kernel) // stride + 1


@dataclass(frozen=True, eq=False, repr=False)
class Step:
    """The base class of steps: a name, the values read and written, a weight and a bias.

    Layouts: activations are NHWC, convolution weights KRSC (``[K, R, S, C / groups]``), biases ``[K]`` in float32.
    """

    kind: ClassVar[str]
    name: str
    input: str
    output: str
    weight: Tensor
    bias: Tensor

    def __repr__(self) -> str:
        sides = "×".join(map(str, self.weight.shape))
        weight = f", weight {sides} {dtype_name(self.weight.dtype)}" if self.weight.numel() else ""
        return f"{type(self).__name__}({self.name}: {describe(self)}; {' + '.join(self.reads)} → {self.output}{weight})"

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.input,)

    @property
    def writes(self) -> tuple[str, ...]:
        """The values that the step writes, ``output`` first."""
        return (self.output,)

    @property
    def parts(self) -> tuple[Step, ...]:
        """The steps that this step contains: itself, or the steps that it joins."""
        return (self,)

    @property
    def parameters(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Weight and bias of each layer in the step."""
        return tuple((part.weight, part.bias) for part in self.parts)

    def with_parameters(self, parameters: Sequence[tuple[Tensor, Tensor]]) -> Step:
        """Return the step with other weights and biases, given in the order of :attr:`parameters`."""
        ((weight, bias),) = parameters
        return replace(self, weight=weight, bias=bias)

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of ``output``, NHWC, for an input of ``shape``."""
        raise NotImplementedError

    def output_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the shapes of all values that the step writes."""
        return (self.output_shape(shape),)

    def macs(self, shape: Shape) -> int:
        """Return the number of multiply-accumulates for an input of ``shape``."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class Stem(Step):
    """Normalisation (for uint8 input), convolution + bias + ReLU and, if ``pool``, a 3×3/2 max-pool.

    Floating-point input must be normalised. ``uint8`` input is first normalised as ``(x / 255 - mean) / std``.
    """

    kind: ClassVar[str] = "stem"
    stride: int
    padding: int
    pool: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def conv_shape(self, shape: Shape) -> tuple[int, int, int, int]:
        n, h, w, _ = shape
        k, r, s, _ = self.weight.shape
        return (n, conv_size(h, r, self.stride, self.padding), conv_size(w, s, self.stride, self.padding), k)

    def output_shape(self, shape: Shape) -> Shape:
        n, p, q, k = self.conv_shape(shape)
        return (n, conv_size(p, 3, 2, 1), conv_size(q, 3, 2, 1), k) if self.pool else (n, p, q, k)

    def macs(self, shape: Shape) -> int:
        n, p, q, _ = self.conv_shape(shape)
        return n * p * q * self.weight.numel()


@dataclass(frozen=True, eq=False, repr=False)
class Conv(Step):
    """Convolution + bias, plus ``residual`` unless it is None, then ReLU if ``relu``."""

    kind: ClassVar[str] = "conv"
    stride: int = 1
    padding: int = 0
    groups: int = 1
    relu: bool = True
    residual: str | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.input,) if self.residual is None else (self.input, self.residual)

    def output_shape(self, shape: Shape) -> Shape:
        n, h, w, _ = shape
        k, r, s, _ = self.weight.shape
        return (n, conv_size(h, r, self.stride, self.padding), conv_size(w, s, self.stride, self.padding), k)

    def macs(self, shape: Shape) -> int:
        n, p, q, _ = self.output_shape(shape)
        return n * p * q * self.weight.numel()


@dataclass(frozen=True, eq=False, repr=False)
class Pool(Step):
    """A pooling step that halves height and width, rounded up: the 3×3/2 maximum or the 2×2/2 average.

    Windows count only the pixels inside the image (``AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)``).
    The step has no weights: ``weight`` and ``bias`` are empty.
    """

    kind: ClassVar[str] = "pool"
    mode: Literal["max", "average"]

    @property
    def parameters(self) -> tuple[tuple[Tensor, Tensor], ...]:
        return ()

    def with_parameters(self, parameters: Sequence[tuple[Tensor, Tensor]]) -> Step:
        return self

    def output_shape(self, shape: Shape) -> Shape:
        n, h, w, c = shape
        return (n, (h + 1) // 2, (w + 1) // 2, c)

    def macs(self, shape: Shape) -> int:
        return 0


@dataclass(frozen=True, eq=False, repr=False)
class SqueezeExcite(Step):
    """Squeeze-and-excitation, then ``residual`` and ReLU: ``y = relu(x · s + residual)``, with a gate for each channel,

        s = sigmoid(expand_weight · relu(weight · mean(x) + bias) + expand_bias).

    ``weight`` is ``[S, C]``, ``expand_weight`` ``[C, S]``. Hu, Shen & Sun, CVPR 2018.
    """

    kind: ClassVar[str] = "squeeze-excite"
    expand_weight: Tensor
    expand_bias: Tensor
    residual: str

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.input, self.residual)

    @property
    def parameters(self) -> tuple[tuple[Tensor, Tensor], ...]:
        return ((self.weight, self.bias), (self.expand_weight, self.expand_bias))

    def with_parameters(self, parameters: Sequence[tuple[Tensor, Tensor]]) -> Step:
        (weight, bias), (expand_weight, expand_bias) = parameters
        return replace(self, weight=weight, bias=bias, expand_weight=expand_weight, expand_bias=expand_bias)

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def macs(self, shape: Shape) -> int:
        return shape[0] * (self.weight.numel() + self.expand_weight.numel())


@dataclass(frozen=True, eq=False, repr=False)
class Joined(Step):
    """The ``last`` convolution of a bottleneck block and its neighbours, computed by one kernel.

    ``first`` is the convolution before it, whose result is then not written. ``shortcut`` is the projection that it
    adds, merged into it by concatenating the reductions. ``following`` is the 1×1 convolution that reads its result;
    both results are written. ``weight`` is the last convolution's, flattened to ``[K, R·S·C]``, or ``[K, R·S·C + U]``
    with a shortcut. ``bias`` is then the sum of the two biases. :mod:`fastres.folding.fusion` builds these steps.
    """

    kind: ClassVar[str] = "joined"
    last: Conv
    first: Conv | None = None
    shortcut: Conv | None = None
    following: Conv | None = None

    @property
    def parts(self) -> tuple[Conv, ...]:
        return tuple(part for part in (self.first, self.shortcut, self.last, self.following) if part is not None)

    @property
    def reads(self) -> tuple[str, ...]:
        added = self.last.residual if self.shortcut is None else self.shortcut.input
        return (self.input,) if added is None else (self.input, added)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.output,) if self.following is None else (self.output, self.following.output)

    def last_input_shape(self, shape: Shape) -> Shape:
        """Return the shape of the last convolution's input, for an input of ``shape``."""
        return shape if self.first is None else self.first.output_shape(shape)

    def output_shape(self, shape: Shape) -> Shape:
        return self.last.output_shape(self.last_input_shape(shape))

    def output_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        y = self.output_shape(shape)
        return (y,) if self.following is None else (y, self.following.output_shape(y))

    def macs(self, shape: Shape) -> int:
        n, p, q, _ = self.output_shape(shape)
        return n * p * q * sum(part.weight.numel() for part in self.parts)


@dataclass(frozen=True, eq=False, repr=False)
class Head(Step):
    """Global average pool, then the linear classifier; ``weight`` is ``[classes, C]``."""

    kind: ClassVar[str] = "head"

    def output_shape(self, shape: Shape) -> Shape:
        return (shape[0], self.weight.shape[0])

    def macs(self, shape: Shape) -> int:
        return shape[0] * self.weight.numel()


def describe(step: Step) -> str:
    """Return a step's attributes in a few words, such as ``3×3/2 groups 32 + residual relu``."""
    if isinstance(step, Head):
        return "average pool, linear" if step.weight.shape[0] else "average pool"
    if isinstance(step, Joined):
        return " → ".join(describe(part) for part in step.parts)
    if isinstance(step, Pool):
        return "max-pool 3×3/2" if step.mode == "max" else "average pool 2×2/2"
    if isinstance(step, SqueezeExcite):
        return f"squeeze to {step.weight.shape[0]}, excite + residual relu"
    assert isinstance(step, (Stem, Conv))
    r, s = step.weight.shape[1:3]
    words = [f"{r}×{s}/{step.stride}"]
    if isinstance(step, Stem):
        words += ["relu", "max-pool 3×3/2"] if step.pool else ["relu"]
    else:
        words += [f"groups {step.groups}"] if step.groups > 1 else []
        words += ["+ residual"] if step.residual else []
        words += ["relu"] if step.relu else []
    return " ".join(words)
