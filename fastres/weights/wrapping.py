"""Find the state dict inside a checkpoint: open the wrappers around it, and strip prefixes from its names.

Training scripts wrap a state dict in a dictionary (``{"state_dict": …, "epoch": …}``) and hold the network inside other
modules, which adds prefixes to its names (``module.``, ``_orig_mod.``, ``net.backbone.``). Known wrappers and prefixes
are removed. Other prefixes are found by the names after them. This module does not look at tensor values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import StateDictMismatchError, UnsafeCheckpointError, WeightsError
from fastres.text import article

from .checkpoints import REMEDY, whole_module
from .unpickling import Inert

# In order of preference: plain weights before their moving average.
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "params",
    "weights",
    "state_dict_ema",
    "model_ema",
    "ema",
    "ema_state_dict",
)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.", "timm_model.")
PREFIX_SHARE = 0.9  # of the keys must have a prefix; a head beside its backbone, or a counter, may lack it
NOT_WEIGHTS = ("n_averaged",)  # AveragedModel's counter of updates
_COUNTER = ".num_batches_tracked"
# A network begins where there is a stem beside blocks; the groups are what precedes their names.
_STEM = re.compile(r"(|.*?\.)(?:conv1(?:\.0)?|(?:resnet\.)?embedder\.embedder\.convolution)\.weight")
_BLOCK = re.compile(r"(|.*?\.)(?:layer1\.0|(?:resnet\.)?encoder\.stages\.0\.layers\.0)\..+")
_HEADS = ("fc.", "linear.", "last_linear.", "classifier.1.")
_LISTED = 6


@dataclass(frozen=True)
class Unwrapped:
    """A flat state dict, the wrappers and prefixes around it (outermost first), and the keys beside it.

    ``part`` is the prefix of the network in the state dict, if other keys in it were left out or the prefix is unusual.
    """

    state: dict[str, Tensor]
    wrappers: tuple[str, ...]
    beside: tuple[str, ...]
    part: str | None = None


def unwrap(obj: object) -> dict[str, Tensor]:
    """Return the flat state dict inside a checkpoint's content, without wrappers and prefixes.

    If a checkpoint holds both weights and their moving average, the plain weights are returned. To get the average,
    pass ``checkpoint["model_ema"]``. Keys outside the network's prefix belong to other parts and are left out. Raises
    ``StateDictMismatchError`` if there is no state dict inside, if it holds something other than tensors, or if it
    holds several networks; ``WeightsError`` for a whole module; and ``UnsafeCheckpointError`` if an object that was not
    read lies among the weights.
    """
    return unwrap_traced(obj).state


def unwrap_traced(obj: object) -> Unwrapped:
    """Do the same as :func:`unwrap`, and also return what was removed."""
    if isinstance(obj, nn.Module):
        raise WeightsError(
            f"The weights are a whole module ({type(obj).__name__}), not a state dict. Pass module.state_dict(), "
            "or call fastres.from_module(module)."
        )
    if not isinstance(obj, Mapping):
        raise StateDictMismatchError(
            f"The checkpoint holds {article(obj)}, not a state dict; pass a mapping from parameter names to tensors."
        )
    wrappers: list[str] = []
    beside: list[str] = []
    items = _items(obj)
    found = _wrapped(items)
    while found is not None:
        wrapper, inner = found
        if len(wrappers) > _LISTED:
            raise StateDictMismatchError("The checkpoint's dictionaries are nested too deeply; pass the state dict.")
        wrappers.append(wrapper)
        beside += [str(key) for key in items if key != wrapper]
        items = inner
        found = _wrapped(items)
    kept = {key: value for key, value in items.items() if key not in NOT_WEIGHTS}
    own, others = _of_one_network(kept)
    state, prefixes = _without_prefixes(_tensors(own))
    root = "".join(prefixes)
    part = root if others or (root and not all(prefix in PREFIXES for prefix in prefixes)) else None
    return Unwrapped(state, (*wrappers, *prefixes), (*beside, *others), part)


def _items(mapping: Mapping[object, object]) -> dict[object, object]:
    """Return the items of a mapping of any class; its methods may raise anything."""
    if type(mapping) is dict:
        return mapping
    try:
        return {key: mapping[key] for key in mapping}
    except Exception as error:
        raise StateDictMismatchError(
            f"The weights are {article(mapping)} that cannot be read ({type(error).__name__}: {error!s:.80}). Pass a "
            "dict from parameter names to tensors."
        ) from error


def _wrapped(items: dict[object, object]) -> tuple[str, dict[object, object]] | None:
    """Return the mapping in ``items`` under a known name, or the only one with a network, and its name; else ``None``.

    A mapping without tensors, such as a configuration, is opened only if there is no other.
    """
    empty: tuple[str, dict[object, object]] | None = None
    for name in WRAPPERS:
        value = items.get(name)
        if isinstance(value, Inert) and not value:
            _refuse_module(name, value)
        elif isinstance(value, Mapping):
            found = name, _items(value)
            if _holds_tensors(found[1]):
                return found
            empty = empty or found
        elif isinstance(value, nn.Module):
            raise WeightsError(
                f"The checkpoint's {name!r} is a whole module ({type(value).__name__}), not a state dict. "
                f"Pass checkpoint[{name!r}].state_dict(), or call fastres.from_module(checkpoint[{name!r}])."
            )
    if any(isinstance(value, Tensor) for value in items.values()):
        return None
    inside = [(str(name), _items(value)) for name, value in items.items() if isinstance(value, Mapping)]
    inside = [(name, value) for name, value in inside if any(isinstance(part, Tensor) for part in value.values())]
    networks = [(name, value) for name, value in inside if _roots(value)]
    if len(networks) > 1:
        names = [name for name, _ in networks]
        raise StateDictMismatchError(
            f"The checkpoint holds {len(networks)} networks: {_quoted(names)}. Pass one of them: "
            f"fastres.load(name, torch.load(path)[{names[0]!r}])."
        )
    if networks or len(inside) == 1:
        return (networks or inside)[0]
    return empty


def _holds_tensors(items: Mapping[object, object], depth: int = 2) -> bool:
    """Return True if there is a tensor in ``items`` or, down to ``depth``, in a mapping in it."""
    inner = [value for value in items.values() if isinstance(value, Mapping)] if depth else []
    return any(isinstance(value, Tensor) for value in items.values()) or any(
        _holds_tensors(_items(value), depth - 1) for value in inner
    )


def _refuse_module(name: str, value: Inert) -> None:
    """Raise if what stands under a wrapper's name in a file is a pickled module."""
    if value.is_module:
        raise UnsafeCheckpointError(f"The checkpoint's {name!r} {whole_module([value.name])}")


def _roots(items: Mapping[Any, object]) -> list[str]:
    """Return the prefixes of the networks in a state dict, in order: what precedes a stem and blocks alike."""
    names = [key for key in items if isinstance(key, str)]
    blocks = {match[1] for match in map(_BLOCK.fullmatch, names) if match}
    stems = [match[1] for match in map(_STEM.fullmatch, names) if match]
    return list(dict.fromkeys(stem for stem in stems if stem in blocks))


def _of_one_network(items: dict[object, object]) -> tuple[dict[object, object], tuple[str, ...]]:
    """Return the items of the one network in ``items``, with their prefix, and the names of the other items.

    A classifier outside the network's prefix belongs to it if the network has none.
    """
    roots = _roots(items)
    if len(roots) > 1:
        raise StateDictMismatchError(
            f"The state dict holds {len(roots)} networks, under the prefixes {_quoted(roots)}. Pass one of them: "
            f"{{k.removeprefix({roots[-1]!r}): v for k, v in state.items() if k.startswith({roots[-1]!r})}}."
        )
    if not roots or not roots[0]:
        return items, ()
    root = roots[0]
    own = {key: value for key, value in items.items() if isinstance(key, str) and key.startswith(root)}
    if not any(str(key).startswith(tuple(root + head for head in _HEADS)) for key in own):
        outer = [root[: match.start()] for match in re.finditer(r"[^.]+\.", root)]
        for head in (outside + head for outside in reversed(outer) for head in _HEADS):
            found = {key: value for key, value in items.items() if isinstance(key, str) and key.startswith(head)}
            if found:
                own.update(found if found.keys() == {f"{head}weight", f"{head}bias"} else {})
                break
    inner = {str(key).removeprefix(root) for key in own}
    others = [key for key in items if key not in own]
    if any(key in inner for key in others):
        raise StateDictMismatchError(
            f"The state dict holds the same names with and without the prefix {root!r}. Pass only one set."
        )
    return {key: value for key, value in items.items() if key in own}, tuple(map(str, others))


def _tensors(items: Mapping[object, object]) -> dict[str, Tensor]:
    """Return ``items`` as a state dict; raises if a key is not a string or a value not a tensor with a shape."""
    if not items:
        raise StateDictMismatchError(
            "The state dict is empty; pass a mapping from parameter names to tensors, such as model.state_dict()."
        )
    state: dict[str, Tensor] = {}
    wrong: list[str] = []
    unread: list[Inert] = []
    for key, value in items.items():
        if not isinstance(key, str):
            raise StateDictMismatchError(
                f"The state dict has a key that is {article(key)}; pass a mapping from parameter names to tensors."
            )
        if isinstance(value, Tensor) and _has_shape(value):
            state[key] = value
        elif key.endswith(_COUNTER) and isinstance(value, int):
            state[key] = _counter(value)
        else:
            wrong.append(f"{key!r} ({_described(value)})")
            unread += [value] if isinstance(value, Inert) and value.kind is None else []
    if unread:
        raise UnsafeCheckpointError(
            f"Among the weights are objects of classes that could run code, and so were not read: {_few(wrong)}. "
            f"{REMEDY}"
        )
    if wrong:
        arrays = any("NumPy" in described or "ndarray" in described for described in wrong)
        advice = (
            "Convert arrays with torch.from_numpy(array)" if arrays else "Pass only the part that holds the weights"
        )
        raise StateDictMismatchError(
            f"The state dict has {len(wrong)} other items: {_few(wrong)}; all values must be tensors. {advice}."
        )
    return state


def _counter(value: int) -> Tensor:
    return torch.tensor(value if abs(value) < 2**63 else 0, dtype=torch.int64, device="cpu")


def _has_shape(tensor: Tensor) -> bool:
    """Return False for nested tensors and uninitialised parameters, which raise if asked for their shape."""
    try:
        return tensor.dim() == len(tensor.shape) and tensor.numel() >= 0
    except Exception:
        return False


def _without_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Strip prefixes that nearly every key has, known ones or that of the network; return them too, outermost first."""
    roots = _roots(state)
    unusual = [f"{roots[0].partition('.')[0]}."] if len(roots) == 1 and roots[0] else []
    for prefix in (*PREFIXES, *unusual):
        if state and sum(key.startswith(prefix) for key in state) >= PREFIX_SHARE * len(state):
            stripped = renamed(state, lambda key, prefix=prefix: key.removeprefix(prefix))  # type: ignore[misc]
            if stripped is None:
                raise StateDictMismatchError(
                    f"The state dict holds the same names with and without the prefix {prefix!r}. Pass only one set."
                )
            inner, prefixes = _without_prefixes(stripped)
            return inner, (prefix, *prefixes)
    return state, ()


def renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor] | None:
    """Return ``state`` with its keys renamed, or ``None`` if two keys would get the same name."""
    result = {rename(key): value for key, value in state.items()}
    return result if len(result) == len(state) else None


def _described(value: object) -> str:
    if isinstance(value, Inert):
        return value.kind or value.name
    return article(value)


def _few(items: list[str]) -> str:
    return ", ".join(items[:_LISTED]) + (" …" if len(items) > _LISTED else "")


def _quoted(names: list[str]) -> str:
    return _few([repr(name) for name in names])
