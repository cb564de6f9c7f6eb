"""Class names by index: those of the package's data files, and those that users give.

:func:`parse` is the one place that reads and checks names, for every function and command with ``categories=``.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from fastres.errors import InputError
from fastres.files import read_text_input

_DIGITS = tuple("0123456789")
ACCEPTED = (
    "a list of names, or a file: .json (a list, or a mapping from '0', '1', … to names), or text with one name a line"
)


@functools.cache
def load(kind: Literal["imagenet", "digits"]) -> tuple[str, ...]:
    """Return the class names of ``kind``, in the order of the logits.

    ``"imagenet"`` has the 1000 names of torchvision's weights, ``"digits"`` has ``"0"`` to ``"9"``. The file is read
    only on the first call. Raises ``InputError`` for any other kind.
    """
    if kind == "digits":
        return _DIGITS
    if kind == "imagenet":
        text = resources.files("fastres").joinpath("data", "imagenet_categories.json").read_text(encoding="utf-8")
        return tuple(json.loads(text))
    raise InputError(f"There are no class names called {kind!r}; use 'imagenet' or 'digits'.")


def placeholders(count: int) -> tuple[str, ...]:
    """Return names for ``count`` classes that have none: ``class 0``, ``class 1``, …."""
    return tuple(f"class {index}" for index in range(count))


def parse(value: Any, count: int) -> tuple[str, ...]:
    """Return the names of ``count`` classes, in the order of the logits.

    ``value`` is a list or tuple of names, a mapping, or the path of a file. A ``.json`` file holds a list or a mapping;
    any other file is UTF-8 text with one name a line. A mapping is from indices to names (``{"0": "tench"}``), from
    indices to lists whose last item is the name (``{"0": ["n01440764", "tench"]}``, ImageNet's class index), or from
    names to indices (a torchvision data set's ``class_to_idx``). Two classes may have the same name.

    Raises ``InputError`` for anything else, for a file that cannot be read, for empty names, and if the number of names
    is not ``count``.
    """
    source = "categories"
    if isinstance(value, (str, os.PathLike)):
        source = str(value)
        value = _read(Path(value))
    elif hasattr(value, "tolist"):  # NumPy's arrays
        value = value.tolist()
    if isinstance(value, Mapping):
        value = _in_order(value, source)
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{source} has the type {type(value).__name__}; give {ACCEPTED}")
    for index, name in enumerate(value):
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{source} has {name!r} as the name of class {index}; every class needs a name, a string")
        if not name.isascii() and name.encode("utf-8", "replace").decode() != name:
            raise InputError(f"{source} has {name!r} as the name of class {index}, which is not text in Unicode")
    if len(value) != count:
        advice = f"give one name for each of the {count} classes" if count else "leave the names out"
        has = f"{count} class{'es' if count != 1 else ''}" if count else "no classifier (num_classes=0)"
        given = f"{len(value)} name{'s' if len(value) != 1 else ''}"
        raise InputError(f"{source} has {given}, but the model has {has}; {advice}")
    return tuple(map(str, value))


def _read(path: Path) -> Any:
    """Return the content of a file of names: of a ``.json`` file as it is, of any other file its lines."""
    try:
        text = read_text_input(path.expanduser()).decode("utf-8-sig")
        return json.loads(text) if path.suffix.lower() == ".json" else [line.strip() for line in text.splitlines()]
    except (OSError, RuntimeError) as error:  # RuntimeError: an unknown user's home
        raise InputError(
            f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}; give {ACCEPTED}"
        ) from error
    except ValueError as error:
        raise InputError(f"{str(path)!r} does not hold class names ({error}); give {ACCEPTED}") from error


def _in_order(names: Mapping[Any, Any], source: str) -> list[Any]:
    """Return the names of a mapping from indices to names, or from names to indices, by index."""
    if names and all(isinstance(index, int) and not isinstance(index, bool) for index in names.values()):
        names = {index: name for name, index in names.items()}
    by_index = {str(index): name for index, name in names.items()}
    wanted = [str(index) for index in range(len(names))]
    if set(by_index) != set(wanted):
        odd = sorted(set(by_index) - set(wanted))
        what = f", for example {odd[0]!r}" if odd else ""
        raise InputError(f"{source} is a mapping whose indices are not 0 to {len(names) - 1}{what}; give {ACCEPTED}")
    found = (by_index[index] for index in wanted)
    return [name[-1] if isinstance(name, (list, tuple)) and name else name for name in found]
