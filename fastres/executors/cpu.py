"""The CPU executor: runs a Plan on oneDNN's fused convolutions.

Activations are channels-last tensors. Weights are packed once, into the layout that oneDNN prefers for the input shape.
Bias, residual add and ReLU run inside the convolution: ``_convolution_pointwise`` computes conv + bias + ReLU, and
``_convolution_pointwise_.binary`` computes conv + bias + add + ReLU in place on the residual. The threads are torch's
(:func:`torch.set_num_threads`). Nothing is compiled. Large batches run in parts, so that their activations fit in
memory that the allocator keeps.

Where oneDNN's functions can be called directly, :mod:`fastres.executors.direct` runs the convolutions and pools: the
same primitives, without the time that an operator of torch takes around each. Otherwise the operators run them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from fastres.errors import DeviceError, DtypeError
from fastres.forks import Guard, calls
from fastres.network.plan import INPUT, LOGITS, POOLED, Conv, Head, Plan, Pool, Shape, SqueezeExcite, Stem, Step
from fastres.onednn.library import library
from fastres.onednn.primitives import Levels
from fastres.text import dtype_name

from .direct import Direct, absent
from .packing import SHAPES_KEPT, Packings
from .pixels import Pixels, whole_rows
from .quota import warn_of_too_many_threads
from .reading import guard_of
from .recent import Recent

# From this size on, glibc's malloc always maps a separate block and returns it to the system when it is freed (on 64
# bits, DEFAULT_MMAP_THRESHOLD_MAX). Each call then pages it in again.
MAPPED_BYTES = 32 * 2**20

_NO_SCALARS: list[float] = []
_NO_DILATION = [1, 1]


def supported_dtypes() -> list[torch.dtype]:
    """Return the dtypes in which oneDNN computes on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return []
    dtypes = [torch.float32]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.append(torch.bfloat16)
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        dtypes.append(torch.float16)
    return dtypes


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ``DtypeError`` if this CPU does not compute in ``dtype``, ``DeviceError`` if torch has no oneDNN."""
    supported = supported_dtypes()
    if not supported:
        raise DeviceError(
            "This build of torch has no oneDNN, which fastres needs on a CPU; install an official torch wheel"
        )
    if dtype not in supported:
        names = ", ".join(map(dtype_name, supported))
        raise DtypeError(
            f"This CPU does not compute in {dtype_name(dtype)}; it supports {names}. "
            "Use model.float(), or move the model to a GPU first"
        )


@dataclass(frozen=True, eq=False)
class PackedConv:
    """A convolution with its weight in oneDNN's layout for one input shape."""

    weight: Tensor
    bias: Tensor
    padding: list[int]
    stride: list[int]
    groups: int
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x,
            self.weight,
            self.bias,
            self.padding,
            self.stride,
            _NO_DILATION,
            self.groups,
            self.activation,
            _NO_SCALARS,
            "",
        )

    def add_(self, residual: Tensor, x: Tensor) -> Tensor:
        """Overwrite ``residual`` with ``activation(conv(x) + bias + residual)`` and return it."""
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual,
            x,
            self.weight,
            self.bias,
            self.padding,
            self.stride,
            _NO_DILATION,
            self.groups,
            "add",
            1.0,
            None if self.activation == "none" else self.activation,
            _NO_SCALARS,
            "",
        )


class CpuExecutor:
    """Runs a plan whose weights are CPU tensors of a dtype in :func:`supported_dtypes`."""

    pixels: Pixels | None = None  # for a stem in 8 bit

    def __init__(self, plan: Plan) -> None:
        dtype = plan.stem.weight.dtype if plan.quantisation is None else torch.float32
        check_dtype(dtype)
        warn_of_too_many_threads()
        self.dtype = dtype
        self.read_dtype: torch.dtype | None = dtype if plan.quantisation is None else None
        self._stored = dtype if plan.quantisation is None else torch.uint8  # of most values
        self._plan = plan
        self._last_reads = plan.last_reads()
        convolutions = (step for step in plan if isinstance(step, (Stem, Conv)))
        weights = sum(step.weight.nbytes for step in convolutions)
        owner = weakref.proxy(self)
        self._packed: Packings[Any] = Packings(lambda shape: owner._pack(shape), weights)
        self._micro_batches: Recent[Shape, int] = Recent(SHAPES_KEPT)
        self._guard = Guard()
        self.direct = None if absent() else Direct(library(), self, plan)
        scale = [1 / (255 * std) for std in plan.stem.std]
        shift = [-mean / std for mean, std in zip(plan.stem.mean, plan.stem.std, strict=True)]
        self._scale, self._shift = (
            torch.tensor(values, dtype=torch.float32, device="cpu").view(1, 3, 1, 1) for values in (scale, shift)
        )
        head = plan.head
        self._classifier = (head.weight, head.bias.to(dtype))
        # oneDNN's ReLU turns NaN into 0, which would hide broken weights or pixels. So a guard is added to all outputs
        # of an image. It is 0 if all weights and pixels are finite, and NaN otherwise.
        parameters = [pair for step in plan for pair in step.parameters]
        self._weights_guard = 0 * sum(
            float(weight.sum(dtype=torch.float32) + bias.sum()) for weight, bias in parameters
        )

    def run(self, x: Tensor, outputs: Sequence[str] = (LOGITS,)) -> list[Tensor]:
        """Run the plan on ``x`` ``[N, 3, H, W]`` (normalised floats or uint8 pixels), as far as ``outputs`` need.

        Returns one tensor for each name in ``outputs``: float32 logits ``[N, classes]``, the pooled features ``[N,
        C]``, or a value of the plan as a channels-last ``[N, C, H, W]`` tensor, the last two in the executor's dtype.
        """
        if torch.is_autocast_enabled("cpu"):  # would run the classifier in another dtype
            with torch.autocast("cpu", enabled=False):
                return self.run(x, outputs)
        n, _, h, w = x.shape
        if x.requires_grad:
            x = x.detach()
        if x.is_neg():  # oneDNN reads the memory, which holds the numbers without their sign
            x = x.resolve_neg()
        with calls:
            # Other outputs are large themselves. Concatenating their parts would cost the copies that this avoids.
            images = n if n == 1 or not {LOGITS, POOLED}.issuperset(outputs) else self._micro_batch((n, h, w, 3))
            if images >= n:
                return self._run(x, outputs)
            parts = [self._run(part, outputs) for part in x.split(images)]
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    def _run(self, x: Tensor, outputs: Sequence[str]) -> list[Tensor]:
        """Run the whole batch at once; see :meth:`run`."""
        n, _, h, w = x.shape
        shape = (n, h, w, 3)
        direct = self.direct if has_memory(x) else None
        values = {INPUT: x}
        if direct is not None:
            guard = direct.run(direct.prepared_for(shape, tuple(outputs)), values)
        else:
            values[INPUT] = self.prepare(x, torch.channels_last)
            guard = None if x.dtype == torch.uint8 else guard_of(values[INPUT])
            self._run_steps(values, range(len(self._plan.steps_for(outputs))), shape, outputs)
        return [self._guarded(self._returned(values[output], output), guard) for output in outputs]

    def _returned(self, value: Tensor, name: str) -> Tensor:
        """Return the value called ``name`` in the form in which callers get it."""
        return value

    def _run_steps(self, values: dict[str, Tensor], indices: range, shape: Shape, outputs: Sequence[str]) -> None:
        """Compute the plan's steps with these indices, for images of ``shape``. Drop values after their last use."""
        packed = self._packed.of(shape)
        for index in indices:
            step = self._plan.steps[index]
            self.run_step(step, values, index, packed, outputs)
            for value in step.reads:
                if self._last_reads[value] == index and value not in outputs:
                    values.pop(value, None)

    def run_step(
        self,
        step: Step,
        values: dict[str, Tensor],
        index: int,
        packed: dict[str, Any],
        outputs: Sequence[str],
    ) -> None:
        """Compute ``step``, the plan's ``index``-th, from ``values`` and add its outputs to them."""
        if isinstance(step, Head):
            self._head(values, step, LOGITS in outputs)
            return
        y = values[step.input]
        if isinstance(step, Pool):
            values[step.output] = pool(y, step.mode)
            return
        if isinstance(step, SqueezeExcite):
            values[step.output] = squeeze_excite(y, values[step.residual], step)
            return
        conv = packed[step.name]
        if isinstance(step, Conv) and step.residual is not None:
            values[step.output] = conv.add_(self._residual(step.residual, values, index, outputs), y)
        else:
            y = conv(y)
            pooled = isinstance(step, Stem) and step.pool
            values[step.output] = pool(y, "max") if pooled else y

    def _residual(self, name: str, values: dict[str, Tensor], index: int, outputs: Sequence[str]) -> Tensor:
        """Return the value ``name`` for the ``index``-th step to overwrite: a copy if it is still needed."""
        value = values[name]
        if name in outputs or self._last_reads[name] > index:
            return value.clone(memory_format=torch.channels_last)
        return value

    def _guarded(self, value: Tensor, guard: Tensor | None) -> Tensor:
        """Return ``value`` ``[N, …]`` as NaN for images with non-finite pixels, or for all if a weight is."""
        if not math.isfinite(self._weights_guard):
            value = value + self._weights_guard
        if guard is not None:
            value = value + guard.view(-1, *[1] * (value.dim() - 1)).to(value.dtype)
        return value

    def prepare(self, x: Tensor, memory_format: torch.memory_format) -> Tensor:
        """Return images ``x`` in the executor's dtype and ``memory_format``; uint8 pixels are normalised first."""
        if x.dtype == torch.uint8:
            x = self.normalised(x)
        # Tensor.to alone returns a crop of channels-last images as it is, with gaps between its rows.
        return x.to(self.dtype, memory_format=memory_format).contiguous(memory_format=memory_format)

    def normalised(self, x: Tensor) -> Tensor:
        """Return uint8 pixels ``[N, 3, H, W]`` as normalised float32 images in the same memory format."""
        if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
            return torch.addcmul(self._shift, x.to(torch.float32), self._scale)
        n, c, h, w = x.shape
        rows, scale, shift = whole_rows(x, self._scale, self._shift)
        return torch.addcmul(shift, rows, scale, out=rows).view(n, h, w, c).permute(0, 3, 1, 2)

    def _head(self, values: dict[str, Tensor], head: Head, classify: bool) -> None:
        values[POOLED] = pooled = values[head.input].mean((2, 3))
        if classify:
            values[LOGITS] = functional.linear(pooled, *self._classifier).to(torch.float32)

    def _micro_batch(self, shape: Shape) -> int:
        with self._guard:
            return self._micro_batches.get_or_make(shape, lambda: micro_batch(self._plan, shape, self._stored))

    def _pack(self, shape: Shape) -> dict[str, Any]:
        shapes = self._plan.shapes(*shape[:3])
        packed = {step.name: self.pack_one(step, shapes[step.input]) for step in self._plan}
        return {name: conv for name, conv in packed.items() if conv is not None}

    def pack_one(self, step: Step, shape: Shape) -> Any:
        """Return ``step`` packed for an input of ``shape`` (NHWC); ``None`` if it has no weights to pack."""
        return pack_step(step, shape) if isinstance(step, (Stem, Conv)) else None

    def value_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the plan's value ``name``."""
        return self.dtype

    def is_direct(self, step: Step) -> bool:
        """Return True if :attr:`direct` computes ``step`` on oneDNN's primitives."""
        return isinstance(step, (Stem, Conv, Pool, Head))

    def levels_of(self, step: Stem | Conv | Head) -> Levels | None:
        """Return the scales of a step in 8 bit; ``None`` if it is not."""
        return None

    def scale_of(self, name: str) -> float:
        """Return what one level of the value ``name`` stands for; 1 if it is not in 8 bit."""
        return 1.0


def has_memory(x: Tensor) -> bool:
    """Return True if oneDNN can read ``x`` in memory. Subclasses and dispatch modes see torch's operators instead."""
    return type(x) in (Tensor, Parameter) and not torch._C._len_torch_dispatch_stack()


def micro_batch(plan: Plan, shape: Shape, dtype: torch.dtype) -> int:
    """Return how many images of a batch of ``shape`` (NHWC) run at once. Needs no weight data.

    The whole batch runs at once if each of its activations takes less than ``MAPPED_BYTES``. Otherwise it is split into
    the fewest equal parts for which this is true.
    """
    n, h, w, _ = shape
    activations = [plan.stem.conv_shape((1, h, w, 3)), *plan.shapes(1, h, w).values()]
    most = (MAPPED_BYTES - 1) // (max(map(math.prod, activations)) * dtype.itemsize)
    parts = math.ceil(n / max(1, most))
    return math.ceil(n / max(1, parts))


def pool(x: Tensor, mode: str) -> Tensor:
    """Pool floating-point ``x`` ``[N, C, H, W]``; ``mode`` is that of :class:`~fastres.network.steps.Pool`."""
    if mode == "max":
        return functional.max_pool2d(x, 3, 2, 1)
    return functional.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)


def squeeze_excite(x: Tensor, residual: Tensor, step: SqueezeExcite) -> Tensor:
    """Gate ``x`` ``[N, C, H, W]``, add ``residual`` and apply ReLU."""
    squeezed = functional.linear(x.mean((2, 3)), step.weight, step.bias.to(x.dtype)).relu_()
    gate = functional.linear(squeezed, step.expand_weight, step.expand_bias.to(x.dtype)).sigmoid_()
    return torch.addcmul(residual, x, gate[:, :, None, None]).relu_()


def pack_step(step: Stem | Conv, shape: Shape) -> PackedConv:
    n, h, w, c = shape
    weight = step.weight.permute(0, 3, 1, 2)
    padding, stride = [step.padding] * 2, [step.stride] * 2
    groups = 1 if isinstance(step, Stem) else step.groups
    activation = "relu" if isinstance(step, Stem) or step.relu else "none"
    weight = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, _NO_DILATION, groups, [n, c, h, w])
    return PackedConv(weight, step.bias.to(step.weight.dtype), padding, stride, groups, activation)


def describe(step: Step) -> str:
    """Name the oneDNN operations that run ``step``, for :meth:`fastres.Model.explain`."""
    if isinstance(step, Head):
        return "mean, linear" if step.weight.shape[0] else "mean"
    if isinstance(step, Stem):
        return "oneDNN conv+bias+relu" + (", max_pool2d" if step.pool else "")
    if isinstance(step, Pool):
        return "max_pool2d" if step.mode == "max" else "avg_pool2d"
    if isinstance(step, SqueezeExcite):
        return "mean, linear+relu, linear+sigmoid, addcmul, relu"
    assert isinstance(step, Conv)
    parts = ["conv+bias"] + ["+add"] * (step.residual is not None) + ["+relu"] * step.relu
    return "oneDNN " + "".join(parts)
