"""What the user names, checked before anything is opened: models, dtypes and engines."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastres.errors import InputError, near_matches
from fastres.model.model import parse_dtype
from fastres.network.architectures import ARCHITECTURES
from fastres.text import article, dtype_name

from .engines import ENGINES as OTHERS
from .exported import FILE_ENGINES, check_file

FASTRES = "fastres"
ENGINES = (FASTRES, *OTHERS)
INT8 = "int8"
AUTO = "auto"


def named(models: Any) -> list[tuple[str | None, Any]]:
    """Return names (``None`` if the user gives none) and models."""
    if isinstance(models, Mapping):
        pairs: list[tuple[str | None, Any]] = [(_own_name(name), given) for name, given in models.items()]
    elif isinstance(models, (str, os.PathLike, nn.Module)):
        pairs = [(None, models)]
    elif isinstance(models, Iterable) and not isinstance(models, (bytes, bytearray)):
        pairs = [(None, given) for given in models]
    else:
        raise InputError(f"models is {article(models)}; pass a model, or a list or mapping of models")
    if not pairs:
        raise InputError("models is empty; pass a model's name, a model, or the path of an exported file")
    return pairs


def _own_name(given: Any) -> str:
    name = str(given)
    if not name.strip() or not name.isprintable():
        raise InputError(f"A model is called {name!r} in models; give each a name that can be shown in one line")
    return name


def check_models(models: Iterable[Any], weights: Any) -> None:
    """Raise an error if an exported file is missing, or if ``weights`` were given that no model takes."""
    takes = False
    for given in models:
        if is_exported(given):
            check_file(given)
        takes |= not isinstance(given, (str, os.PathLike)) or given in ARCHITECTURES
    if not takes and not (isinstance(weights, str) and weights == "DEFAULT"):
        raise InputError(
            "weights were given, but every model is a file, which has its own; leave weights out, or pass a model by "
            "its name"
        )


def is_exported(given: Any) -> bool:
    return isinstance(given, (str, os.PathLike)) and suffix(given) in FILE_ENGINES


def suffix(path: str | os.PathLike[str]) -> str:
    return Path(os.fsdecode(path)).suffix.lower()


def float_names() -> tuple[str, ...]:
    return tuple(dtype_name(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))


def dtype_names(given: Any) -> tuple[str, ...]:
    listed = _listed(given, "dtypes")
    names = tuple(dict.fromkeys(AUTO if dtype is None else dtype_name(dtype) for dtype in listed))
    for name in names:
        if name != INT8:
            parse_dtype(name)
    if not names:
        raise InputError(f"dtypes is empty; give some of {', '.join((AUTO, *float_names(), INT8))}")
    return names


def engine_names(given: Any) -> tuple[str, ...]:
    """Return the engines, or ``()`` if the user gives none."""
    names = [] if given is None else _listed(given, "engines")
    for name in names:
        if name not in ENGINES:
            raise InputError(
                f"There is no engine {name!r}; use {', '.join(ENGINES)}.{near_matches(str(name), ENGINES)}"
            )
    return tuple(dict.fromkeys(names))


def _listed(given: Any, argument: str) -> list[Any]:
    if given is None or isinstance(given, (str, torch.dtype)):
        return [given]
    if isinstance(given, Iterable):
        return list(given)
    raise InputError(f"{argument} is {article(given)}; give a name, or a list of names")
