"""Record which operations a module runs on a batch, and compare them with those of a ResNet.

A module's layers and their names do not say what its ``forward`` computes. PyTorch's dispatcher does: every operation
passes through it, with its tensors and settings, whether a layer, a hook or a function calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from .wiring import Values

Settings = tuple[Any, ...] | None
Arguments = dict[str, Any]

_SAME = ("alias", "detach", "clone", "lift_fresh", "_to_copy")  # the same numbers in the same places
_RESHAPES = ("view", "_unsafe_view", "reshape", "flatten")
_SQUEEZES = ("squeeze", "unsqueeze", "select")
_READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose")
_TAG = "_fastres_value"


class Recorder(TorchDispatchMode):
    """Gives each tensor the number of its value (:class:`Values`), and notes the first operation of no ResNet.

    ``problem`` describes that operation, with the layer that ran it. ``found`` has copies of the tensors whose values
    are in ``keep``. The recorder is the context of one call of ``module``, which has hooks that follow the layers until
    the context ends.
    """

    def __init__(self, module: nn.Module, values: Values, x: Tensor, keep: Collection[int] = ()) -> None:
        super().__init__()
        self.problem: str | None = None
        self.found: dict[int, Tensor] = {}
        self._keep = keep
        self._values = values
        tensors = (*module.parameters(), *module.buffers())
        self._parameters = {id(tensor): values.parameter(tensor) for tensor in tensors}
        self._layers: list[str] = []
        self._writes: dict[int, int] = {}  # how often each storage was written
        self._set(x, values.number("image"))
        self._hooks: list[RemovableHandle] = []
        for name, layer in module.named_modules():
            self._follow(name, layer)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def value(self, tensor: object) -> int | None:
        """Return the number of a tensor's value, or ``None`` if it comes from elsewhere or was overwritten."""
        if not isinstance(tensor, Tensor):
            return None
        if id(tensor) in self._parameters:
            return self._parameters[id(tensor)]
        owner, number, writes = getattr(tensor, _TAG, (None, 0, 0))
        return number if owner is self and writes == self._writes_to(tensor) else None

    def number(self, name: str, operands: Sequence[object], settings: Settings = ()) -> int | None:
        """Return the number of an operation on tensors, or ``None`` if an operand or ``settings`` are of no ResNet."""
        values = [self.value(operand) for operand in operands]
        return None if None in values or settings is None else self._values.number(name, *values, *settings)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given, written = _arguments(func, args, kwargs or {})
        name = func._schema.name.partition("::")[2]
        name = name.removesuffix("_") if written else name
        name = "batch_norm" if "batch_norm" in name else name
        read = _OPERATIONS.get(name)
        number = None if read is None else read(self, given)
        result = func(*args, **(kwargs or {}))
        for tensor in written:
            self._writes[_storage(tensor)] = self._writes_to(tensor) + 1
        harmless = name == "empty" and not result.numel()  # part of batch norm
        if number is None or not self._values.known(number) or any(id(t) in self._parameters for t in written):
            if not harmless:
                self._note(name, given)
        else:
            self._set(result[0] if isinstance(result, tuple) else result, number)
        return result

    def _set(self, tensor: Tensor, number: int) -> None:
        setattr(tensor, _TAG, (self, number, self._writes_to(tensor)))
        if number in self._keep:
            self.found[number] = tensor.clone()

    def _writes_to(self, tensor: Tensor) -> int:
        return self._writes.get(_storage(tensor), 0)

    def _note(self, name: str, given: Arguments) -> None:
        if self.problem is not None:
            return
        if name in _READS:
            what = "reads the values of a tensor, so what it computes can depend on the image"
        else:
            settings = [f"{key}={value}" for key, value in given.items() if isinstance(value, (int, float, list))]
            what = f"computes {name}({', '.join(settings)}), which a ResNet does not compute there"
        self.problem = f"{self._layers[-1]} {what}" if self._layers else f"it {what}"

    def _follow(self, name: str, layer: nn.Module) -> None:
        kind = type(layer).__name__ if next(layer.children(), None) else str(layer)

        def enter(*_: object) -> None:
            self._layers.append(f"{name} ({kind})" if name else kind)

        def leave(*_: object) -> None:
            self._layers.pop()

        self._hooks.append(layer.register_forward_pre_hook(enter))
        self._hooks.append(layer.register_forward_hook(leave, always_call=True))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _arguments(func: Any, args: tuple[Any, ...], kwargs: Arguments) -> tuple[Arguments, list[Tensor]]:
    """Return the arguments of an operation by name, with defaults, and the tensors that it overwrites."""
    known = func._schema.arguments
    given = {argument.name: argument.default_value for argument in known}
    given.update({argument.name: value for argument, value in zip(known, args, strict=False)})
    given.update(kwargs)
    written = [given[a.name] for a in known if a.alias_info is not None and a.alias_info.is_write]
    return given, [tensor for tensor in written if isinstance(tensor, Tensor)]


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return value[0], value[-1]


def _same(recorder: Recorder, a: Arguments) -> int | None:
    x = a["self"]
    same = a.get("dtype") in (None, x.dtype) and a.get("device") in (None, x.device)
    return recorder.value(x) if same else None


def _reshaped(recorder: Recorder, a: Arguments) -> int | None:
    """Return the value of ``[N, C, 1, 1]`` that becomes ``[N, C]``, or the other way round."""
    x, size = a["self"], a.get("size", a.get("shape"))
    if size is None or x.dim() < 2 or math.prod(x.shape[2:]) != 1:
        return None
    full = [given if given != -1 else known for given, known in zip(size[:2], x.shape, strict=False)]
    return recorder.value(x) if full == list(x.shape[:2]) and math.prod(size[2:]) in (1, -1) else None


def _squeezed(recorder: Recorder, a: Arguments) -> int | None:
    """Return the value of ``[N, C, 1, 1]`` from which dimensions of length 1 are taken, or to which they are added."""
    x, given = a["self"], a.get("dim")
    dimensions = [given] if isinstance(given, int) else given
    if dimensions is None or x.dim() < 2 or math.prod(x.shape[2:]) != 1:  # squeeze() would also take a batch of one
        return None
    return recorder.value(x) if all(index >= 2 or index < 0 <= index + x.dim() - 2 for index in dimensions) else None


def _restrided(recorder: Recorder, a: Arguments) -> int | None:
    """Return the value of a tensor whose strides change only where the length is 1, as in channels-last pooling."""
    x = a["self"]
    steps = zip(a["size"], a["stride"], x.stride(), strict=False)
    same = list(a["size"]) == list(x.shape) and all(new == old or length == 1 for length, new, old in steps)
    return recorder.value(x) if same and a["storage_offset"] in (None, x.storage_offset()) else None


def _conv(recorder: Recorder, a: Arguments) -> int | None:
    bias = None if a["bias"] is None else recorder.value(a["bias"])
    if a["transposed"] or (bias is None and a["bias"] is not None):
        return None
    settings = (bias, *(_pair(a[name]) for name in ("stride", "padding", "dilation")), a["groups"])
    return recorder.number("conv", (a["input"], a["weight"]), settings)


def _norm(recorder: Recorder, a: Arguments) -> int | None:
    operands = [a[name] for name in ("input", "weight", "bias", "running_mean", "running_var")]
    return recorder.number("norm", operands, None if a.get("training") else (a["eps"],))


def _linear(recorder: Recorder, a: Arguments) -> int | None:
    settings = () if a["alpha"] == a["beta"] == 1 else None
    return recorder.number("linear", (a["mat1"], a["mat2"], a["self"]), settings)


def _slice(recorder: Recorder, a: Arguments) -> int | None:
    x, dimension = a["self"], a["dim"] % a["self"].dim()
    if (a["start"] or 0) != 0 or (a["end"] is not None and a["end"] < x.shape[dimension]):
        return None
    return recorder.value(x) if a["step"] == 1 else recorder.number("slice", (x,), (dimension, a["step"]))


def _unary(name: str, settings: Callable[[Arguments], Settings] = lambda _: ()) -> Callable[..., int | None]:
    return lambda recorder, a: recorder.number(name, (a["self"],), settings(a))


def _binary(name: str) -> Callable[..., int | None]:
    def read(recorder: Recorder, a: Arguments) -> int | None:
        return recorder.number(name, (a["self"], a["other"]), () if a.get("alpha", 1) == 1 else None)

    return read


def _pool(a: Arguments) -> Settings:
    return tuple(_pair(value or a["kernel_size"]) for value in (a["kernel_size"], a["stride"], a["padding"]))


def _max_pool(a: Arguments) -> Settings:
    return _pool(a) if _pair(a["dilation"]) == (1, 1) and not a["ceil_mode"] else None


def _average_pool(a: Arguments) -> Settings:
    pairs = None if a["divisor_override"] is not None else _pool(a)
    return None if pairs is None else (*pairs, a["ceil_mode"], a["count_include_pad"])


def _mean(a: Arguments) -> Settings:
    x, dimensions = a["self"], a.get("dim")
    whole = x.dim() == 4 and dimensions is not None and sorted(index % 4 for index in dimensions) == [2, 3]
    return () if whole and a["dtype"] in (None, x.dtype) else None


def _padding(a: Arguments) -> Settings:
    widths = a["pad"]
    channels = a["self"].dim() == 4 and len(widths) == 6 and not any(widths[:4]) and a["value"] == 0
    return tuple(widths[4:]) if channels else None


_OPERATIONS: dict[str, Callable[[Recorder, Arguments], int | None]] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_RESHAPES, _reshaped),
    **dict.fromkeys(_SQUEEZES, _squeezed),
    "as_strided": _restrided,
    "convolution": _conv,
    "batch_norm": _norm,
    "relu": _unary("relu"),
    "sigmoid": _unary("sigmoid"),
    "add": _binary("add"),
    "mul": _binary("mul"),
    "max_pool2d_with_indices": _unary("max_pool", _max_pool),
    "avg_pool2d": _unary("average_pool", _average_pool),
    "mean": _unary("mean", _mean),
    "slice": _slice,
    "constant_pad_nd": _unary("pad", _padding),
    "t": _unary("transposed"),
    "addmm": _linear,
}
