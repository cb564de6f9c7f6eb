"""Fit a state dict to an architecture: check it name by name, cast it to float32, add a new head if requested.

This module also creates random weights. All tensors that it returns are plain CPU tensors, in torchvision's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastres.errors import StateDictMismatchError, WeightsError
from fastres.network.architectures import ARCHITECTURES, Architecture, conv_specs, gate_shapes, state_dict_shapes
from fastres.terminal import warn
from fastres.text import dtype_name

HEAD = ("fc.weight", "fc.bias")
COUNTER = "num_batches_tracked"
_LISTED = 8  # keys named in a message, of each kind


class FreshHeadWarning(UserWarning):
    """The classifier was initialised at random: the checkpoint has no classifier or another number of classes."""


@dataclass(frozen=True)
class Fitted:
    """A state dict that fits ``arch``; ``missing_head`` is True if its head is random, not the checkpoint's."""

    state: dict[str, Tensor]
    arch: Architecture
    missing_head: bool


def fit_state(
    state: Mapping[str, Tensor], arch: Architecture, num_classes: int | None, source: str, copy: bool
) -> Fitted:
    """Check ``state`` (torchvision's names) against ``arch`` and return it complete, as float32 on the CPU.

    The number of classes is that of the checkpoint's ``fc.weight``. If ``num_classes`` differs from it, or the
    checkpoint has no head and ``num_classes`` is given, a new head is initialised like an ``nn.Linear``, with a
    ``FreshHeadWarning``. With ``num_classes=0`` there is no head. ``num_batches_tracked`` is kept if present and zero
    otherwise. With ``copy``, no tensor shares memory with ``state``. Raises ``StateDictMismatchError``, which names
    every kind of mismatch, and ``ArchitectureError`` for an invalid ``num_classes``.
    """
    floating = {key: value for key, value in state.items() if not key.endswith(COUNTER)}
    headless = not any(key in floating for key in HEAD)
    given = arch.with_classes(_classes(floating) or arch.num_classes)
    wanted = given if num_classes is None else arch.with_classes(num_classes)
    problems = misfits(floating, given, needs_head=not headless or num_classes is None)
    if problems:
        raise StateDictMismatchError(_mismatch(problems, floating, given, source))
    fresh = wanted.num_classes > 0 and (headless or wanted.num_classes != given.num_classes)
    kept = [key for key in state_dict_shapes(wanted) if not (fresh and key in HEAD)]
    fitted = _owned({key: floating[key] for key in kept}, copy, source)
    if fresh:
        fitted.update(_fresh_head(wanted))
        held = "no classifier" if headless else f"a classifier of {given.num_classes} classes"
        warn(
            f"The weights from {source} have {held}, so the head for num_classes={wanted.num_classes} is random. Its "
            "logits are meaningless until you load a trained head of that size",
            FreshHeadWarning,
            stacklevel=5,  # the caller of fastres.load
        )
    return Fitted(_with_counters(fitted, wanted, state), wanted, fresh)


def random_state(arch: Architecture) -> dict[str, Tensor]:
    """Return random weights, initialised as in torchvision: the same ``torch.manual_seed`` gives the same values.

    Convolutions are normal with variance ``2 / (K·R·S)`` (He et al., ICCV 2015, fan out), batch norms are the identity,
    the biases of squeeze-and-excitation are zero, and the head has ``nn.Linear``'s default. The values are drawn from
    torch's global generator.
    """
    state: dict[str, Tensor] = {}
    for spec in conv_specs(arch):
        # torchvision first fills each convolution with PyTorch's default. Draw the same number of values, so that the
        # random sequence continues at the same place. They are overwritten below.
        state[f"{spec.conv}.weight"] = torch.empty(spec.weight_shape, dtype=torch.float32, device="cpu").uniform_()
    state.update(_fresh_head(arch))
    for name, shape in gate_shapes(arch):
        state[name] = torch.empty(shape, dtype=torch.float32, device="cpu")
        if name.endswith("weight"):
            nn.init.kaiming_normal_(state[name], mode="fan_out", nonlinearity="relu")
        else:
            nn.init.zeros_(state[name])
    for spec in conv_specs(arch):
        nn.init.kaiming_normal_(state[f"{spec.conv}.weight"], mode="fan_out", nonlinearity="relu")
        for part, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            state[f"{spec.norm}.{part}"] = torch.full((spec.out_channels,), value, dtype=torch.float32, device="cpu")
    return _with_counters({key: state[key] for key in state_dict_shapes(arch)}, arch, {})


def _fresh_head(arch: Architecture) -> dict[str, Tensor]:
    if not arch.num_classes:
        return {}
    head = nn.Linear(arch.features, arch.num_classes, device="cpu", dtype=torch.float32)
    return {"fc.weight": head.weight.detach(), "fc.bias": head.bias.detach()}


def _with_counters(state: Mapping[str, Tensor], arch: Architecture, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` in torchvision's order with batch norm's counters, int64 scalars from ``given`` or zero."""
    whole: dict[str, Tensor] = {}
    for key in state_dict_shapes(arch):
        whole[key] = state[key]
        norm, _, part = key.rpartition(".")
        if part == "running_var":
            count = _count(given.get(f"{norm}.{COUNTER}"))
            whole[f"{norm}.{COUNTER}"] = torch.tensor(count, dtype=torch.int64, device="cpu")
    return whole


def _count(counter: Tensor | None) -> int:
    """Return a counter's value, or 0 if it has none; it has no effect on the results, so any tensor may be there."""
    try:
        value = 0 if counter is None or counter.numel() != 1 else int(counter.detach().item())
    except Exception:  # NaN, infinity, complex numbers, tensors without data or of other layouts
        return 0
    return value if abs(value) < 2**63 else 0


def _owned(state: Mapping[str, Tensor], copy: bool, source: str) -> dict[str, Tensor]:
    """Return plain contiguous float32 tensors on the CPU, each with its own memory.

    Without ``copy``, a tensor is kept if it has no other's memory and not only a part of its storage.
    """
    owned: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in state.items():
        try:
            plain = tensor.detach().resolve_neg().to("cpu", torch.float32).contiguous()
            if type(plain) is not Tensor:
                plain = plain.as_subclass(Tensor)
            memory = plain.untyped_storage()
            given = copy and memory.data_ptr() == tensor.untyped_storage().data_ptr()
            if given or memory.data_ptr() in seen or memory.nbytes() != plain.nbytes:
                plain = plain.clone(memory_format=torch.contiguous_format)
            seen.add(plain.untyped_storage().data_ptr())
        except (RuntimeError, MemoryError, NotImplementedError) as error:
            what = str(error).partition("\n")[0]
            raise WeightsError(
                f"{key} of {source} cannot be converted to float32: it is {_described(tensor)} ({what:.120}). Pass "
                "dense tensors of float32, or of a type that PyTorch converts to it, and have enough memory."
            ) from error
        owned[key] = plain
    return owned


def _described(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}"


def _classes(state: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes of the head in ``state``, or ``None`` if it has no usable head."""
    head = state.get("fc.weight", state.get("fc.bias"))
    return head.shape[0] if head is not None and head.ndim and head.shape[0] else None


def misfits(state: Mapping[str, Tensor], arch: Architecture, needs_head: bool = True) -> dict[str, list[str]]:
    """Return the mismatches of ``state``, without counters, and ``arch`` by kind; empty if everything fits."""
    shapes = {key: shape for key, shape in state_dict_shapes(arch).items() if needs_head or key not in HEAD}
    both = [key for key in shapes if key in state]
    problems = {
        "missing": [key for key in shapes if key not in state],
        "unexpected": [key for key in state if key not in shapes],
        "with a wrong shape": [
            f"{key} {list(state[key].shape)} instead of {list(shapes[key])}"
            for key in both
            if tuple(state[key].shape) != shapes[key]
        ],
        "not dense floating-point data": [
            f"{key} ({_kind(state[key])})" for key in both if _kind(state[key]) is not None
        ],
    }
    return {kind: keys for kind, keys in problems.items() if keys}


def _kind(tensor: Tensor) -> str | None:
    """Return the reason why a tensor cannot be a weight, or ``None`` if it can."""
    if tensor.is_meta:
        return "on the meta device, without data"
    if tensor.layout is not torch.strided:
        return str(tensor.layout)
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # it computes its values when it is used
        return f"a {type(tensor).__name__}"
    return None if tensor.is_floating_point() else str(tensor.dtype)


def _mismatch(problems: Mapping[str, list[str]], state: Mapping[str, Tensor], arch: Architecture, source: str) -> str:
    lines = [f"The weights from {source} do not fit {arch.name}.", *(f"  {line}" for line in _lines(problems))]
    fitting = known_fits(state)
    if problems.keys() == {"missing"} and set(problems["missing"]) == set(HEAD):
        lines.append(
            "They have no classifier. Pass num_classes=N for a random one, or num_classes=0 for none: an embedder, "
            "whose model(x) returns the pooled features."
        )
    elif arch.name in fitting:
        lines.append("Names and shapes are right; pass the weights as dense floating-point tensors.")
    elif fitting:
        lines.append(
            f"Their names and shapes are those of {' and '.join(map(repr, fitting))}; load that model instead."
        )
    else:
        lines.append(
            "Their names and shapes match no model that fastres knows. Use torchvision's names, such as "
            "'layer1.0.conv1.weight'."
        )
    return "\n".join(lines)


def describe_misfits(state: Mapping[str, Tensor], arch: Architecture) -> list[str]:
    """Return the mismatches between ``state`` and ``arch``, a line for each kind; a missing head is not reported."""
    floating = {key: value for key, value in state.items() if not key.endswith(COUNTER)}
    given = arch.with_classes(_classes(floating) or arch.num_classes)
    return _lines(misfits(floating, given, needs_head=any(key in floating for key in HEAD)))


def _lines(problems: Mapping[str, list[str]]) -> list[str]:
    lines = []
    for kind, keys in problems.items():
        more = f", and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
        lines.append(f"{len(keys)} {kind}: {', '.join(keys[:_LISTED])}{more}")
    return lines


def known_fits(state: Mapping[str, Tensor]) -> list[str]:
    """Return the models with exactly the names and shapes of ``state``, for any number of classes or no head."""
    found = {key: tuple(value.shape) for key, value in state.items() if not key.endswith(COUNTER)}
    headless = not any(key in found for key in HEAD)
    fits = []
    for row in ARCHITECTURES.values():
        shapes = state_dict_shapes(row.with_classes(_classes(state) or row.num_classes))
        if found == {key: shape for key, shape in shapes.items() if not (headless and key in HEAD)}:
            fits.append(row.name)
    return fits
