"""Translate other libraries' checkpoints to a flat state dict with torchvision's names.

Training scripts wrap a state dict in a dictionary (``{"state_dict": …, "epoch": …}``) and add prefixes to its names
(``module.`` of ``DataParallel``, ``_orig_mod.`` of ``torch.compile``), and some libraries use other names for the
layers. The tables below list the known wrappers, prefixes and names. This module does not look at tensor values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

from torch import Tensor, nn

from fastres.errors import StateDictMismatchError, WeightsError
from fastres.network.architectures import Architecture, state_dict_shapes

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


@dataclass(frozen=True)
class Layout:
    """A naming scheme: regular expressions that turn its keys into torchvision's names, applied in order."""

    name: str
    rules: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

    def rename(self, key: str) -> str:
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key


def _transformers_conv(match: re.Match[str]) -> str:
    """Rename ``stages.S.layers.L.layer.I.convolution``; stages and convolutions count from 0, torchvision's from 1."""
    kind = "conv" if match["part"] == "convolution" else "bn"
    return f"layer{int(match['stage']) + 1}.{match['block']}.{kind}{int(match['index']) + 1}."


# The enclosing modules' names are optional: headless models have no "resnet.", and "encoder." is stripped as a prefix.
_STAGE = r"^(?:resnet\.)?(?:encoder\.)?stages\.(?P<stage>\d+)\.layers\.(?P<block>\d+)\."
_TRANSFORMERS = (
    (r"^(?:resnet\.)?embedder\.embedder\.convolution\.", "conv1."),
    (r"^(?:resnet\.)?embedder\.embedder\.normalization\.", "bn1."),
    (_STAGE + r"layer\.(?P<index>\d+)\.(?P<part>convolution|normalization)\.", _transformers_conv),
    (_STAGE + r"shortcut\.convolution\.", lambda m: f"layer{int(m['stage']) + 1}.{m['block']}.downsample.0."),
    (_STAGE + r"shortcut\.normalization\.", lambda m: f"layer{int(m['stage']) + 1}.{m['block']}.downsample.1."),
    (r"^classifier\.1\.", "fc."),
)

LAYOUTS = (
    Layout("torchvision", ()),
    Layout("transformers", _TRANSFORMERS),
    Layout("CIFAR training codes", ((r"^linear\.", "fc."), (r"\.shortcut\.(\d+)\.", r".downsample.\1."))),
    Layout("pretrainedmodels", ((r"^last_linear\.", "fc."),)),
)


@dataclass(frozen=True)
class Unwrapped:
    """A flat state dict, the wrappers and prefixes around it (outermost first), and the keys beside it."""

    state: dict[str, Tensor]
    wrappers: tuple[str, ...]
    beside: tuple[str, ...]


def unwrap(obj: object) -> dict[str, Tensor]:
    """Return the flat state dict inside a checkpoint's content, without wrappers and prefixes.

    If a checkpoint holds both weights and their moving average, the plain weights are returned. To get the average,
    pass ``checkpoint["model_ema"]``. Raises ``StateDictMismatchError`` if there is no state dict inside or it holds
    something other than tensors, and ``WeightsError`` for a whole module.
    """
    return unwrap_traced(obj).state


def unwrap_traced(obj: object) -> Unwrapped:
    """Do the same as :func:`unwrap`, and also return the wrappers and prefixes that were removed."""
    if isinstance(obj, nn.Module):
        raise WeightsError(
            f"The weights are a whole module ({type(obj).__name__}), not a state dict. Pass module.state_dict(), "
            "or call fastres.from_module(module)."
        )
    if not isinstance(obj, Mapping):
        raise StateDictMismatchError(
            f"The checkpoint holds {_article(obj)}, not a state dict; pass a mapping from parameter names to tensors."
        )
    wrappers: list[str] = []
    beside: list[str] = []
    found = _wrapped(obj)
    while found is not None:
        wrapper, inner = found
        wrappers.append(wrapper)
        beside += [str(key) for key in obj if key != wrapper]
        obj, found = inner, _wrapped(inner)
    kept = {key: value for key, value in _tensors(obj).items() if key not in NOT_WEIGHTS}
    state, prefixes = _without_prefixes(kept)
    return Unwrapped(state, (*wrappers, *prefixes), tuple(beside))


def to_torchvision(state: Mapping[str, Tensor], arch: Architecture) -> dict[str, Tensor]:
    """Return ``state`` under torchvision's names, using the layout that explains most of ``arch``'s parameters.

    Unknown keys are kept, so that the check against the architecture can name them.
    """
    return recognise(state, state_dict_shapes(arch).keys())[1]


def recognise(state: Mapping[str, Tensor], wanted: Set[str]) -> tuple[Layout, dict[str, Tensor]]:
    """Return the layout that turns the names in ``state`` into most of ``wanted``, and ``state`` renamed by it."""
    candidates = [(layout, _renamed(state, layout.rename)) for layout in LAYOUTS]
    possible = [(layout, renamed) for layout, renamed in candidates if renamed is not None]
    return max(possible, key=lambda candidate: len(wanted & candidate[1].keys()))


def _wrapped(obj: Mapping[str, object]) -> tuple[str, Mapping[str, object]] | None:
    """Return the mapping in ``obj`` under a known name, or the only one with tensors, and its name; else ``None``."""
    for name in WRAPPERS:
        value = obj.get(name)
        if isinstance(value, Mapping):
            return name, value
        if isinstance(value, nn.Module):
            raise WeightsError(
                f"The checkpoint's {name!r} is a whole module ({type(value).__name__}), not a state dict. "
                f"Pass checkpoint[{name!r}].state_dict(), or call fastres.from_module(checkpoint[{name!r}])."
            )
    if any(isinstance(value, Tensor) for value in obj.values()):
        return None
    inside = [
        (str(name), value)
        for name, value in obj.items()
        if isinstance(value, Mapping) and any(isinstance(tensor, Tensor) for tensor in value.values())
    ]
    return inside[0] if len(inside) == 1 else None


def _tensors(state: Mapping[str, object]) -> dict[str, Tensor]:
    """Return ``state`` if it is not empty and maps only strings to tensors; else raise ``StateDictMismatchError``."""
    if not state:
        raise StateDictMismatchError("The state dict is empty; pass one that holds the model's parameters.")
    wrong = [f"{key!r} ({_article(value)})" for key, value in state.items() if not isinstance(value, Tensor)]
    wrong += [f"{key!r} (a key that is {_article(key)})" for key in state if not isinstance(key, str)]
    if wrong:
        raise StateDictMismatchError(
            f"A state dict maps names to tensors, but this one also has {len(wrong)} other items: "
            f"{', '.join(wrong[:8])}{' …' if wrong[8:] else ''}. Pass only the part that holds the weights."
        )
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _without_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Strip known prefixes, also nested ones, that nearly every key has; return them as well, outermost first."""
    for prefix in PREFIXES:
        if state and sum(key.startswith(prefix) for key in state) >= PREFIX_SHARE * len(state):
            stripped = _renamed(state, lambda key, prefix=prefix: key.removeprefix(prefix))  # type: ignore[misc]
            if stripped is None:
                raise StateDictMismatchError(
                    f"The state dict holds the same names with and without the prefix {prefix!r}. Pass only one set."
                )
            inner, prefixes = _without_prefixes(stripped)
            return inner, (prefix, *prefixes)
    return state, ()


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor] | None:
    """Return ``state`` with its keys renamed, or ``None`` if two keys would get the same name."""
    renamed = {rename(key): value for key, value in state.items()}
    return renamed if len(renamed) == len(state) else None


def _article(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
