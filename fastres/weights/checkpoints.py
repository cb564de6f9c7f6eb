"""Read checkpoint files without running code from them.

``.safetensors`` files are read by safetensors, everything else by ``torch.load(weights_only=True)``, which accepts
tensors, plain containers and the command lines of training scripts, and nothing else. Errors from either library about
a bad file become fastres errors here.
"""

from __future__ import annotations

import argparse
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastres.errors import CorruptCheckpointError, UnsafeCheckpointError, WeightsError

SUFFIXES = (".pth", ".pt", ".safetensors")
OTHER_SUFFIXES = (".th", ".ckpt", ".bin", ".tar")  # used for PyTorch files in other code bases

# Training scripts (torchvision's, timm's) save their command line beside the weights. It has attributes, but no code.
PLAIN_CLASSES: list[Any] = [argparse.Namespace]

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # the formats of torch.save since 2020 and before 2020
_REMEDY = (
    "If you trust the file, load it in the program that made it and save only the weights: "
    "torch.save(model.state_dict(), path) or safetensors.torch.save_file(model.state_dict(), path). Or pass the state "
    "dict itself."
)
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_REFUSAL = re.compile(
    r"unrecognized function|can only (create|build|append|extend|setitem)|must be imported|persistent_load|"
    r"unsupported operand",
    re.IGNORECASE,
)


def is_path_like(text: str) -> bool:
    """Return True if a string looks like a path: it has a checkpoint's suffix or a path separator."""
    return is_checkpoint_name(text) or os.sep in text


def is_checkpoint_name(text: str) -> bool:
    """Return True if a string ends in the suffix of a checkpoint file."""
    return Path(text).suffix.lower() in SUFFIXES + OTHER_SUFFIXES


def read_checkpoint(path: Path) -> object:
    """Return the content of a checkpoint file, with tensors on the CPU; a ``.safetensors`` file may be memory-mapped.

    Raises ``WeightsError`` if the file does not exist or cannot be read, ``CorruptCheckpointError`` if it is truncated,
    altered or not a checkpoint, and ``UnsafeCheckpointError`` if it holds more than tensors and plain data.
    """
    if not path.exists():
        raise WeightsError(f"There is no file {path}. Pass the path of a {', '.join(SUFFIXES)} file.")
    if not path.is_file():
        raise WeightsError(f"{path} is not a file. Pass the path of a {', '.join(SUFFIXES)} file.")
    try:
        with open(path, "rb") as stream:
            beginning = stream.read(16)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    return _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_pickle(path, beginning)


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptCheckpointError(_corrupt(path, "safetensors file", str(error))) from error


def _read_pickle(path: Path, beginning: bytes) -> object:
    try:
        with torch.serialization.safe_globals(PLAIN_CLASSES):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything; every error means that it is unsafe or corrupt
        refusal = _refusal(path, beginning, error)
        if refusal is not None:
            raise UnsafeCheckpointError(f"{path} {refusal}") from error
        raise CorruptCheckpointError(_corrupt(path, "PyTorch checkpoint", _damage(beginning, error))) from error


def _corrupt(path: Path, kind: str, what: str) -> str:
    return (
        f"{path} ({path.stat().st_size:,} bytes) is not a complete {kind}: {what}. The file may be truncated, or a web "
        "page or a Git LFS pointer may have been saved in its place. Download or save it again."
    )


def _damage(beginning: bytes, error: Exception) -> str:
    """Describe the damage of a file in a few words."""
    if not beginning:
        return "it is empty"
    if not beginning.startswith((_ZIP, _PICKLE)):
        return f"it begins with {beginning!r}"
    if isinstance(error, RuntimeError):
        return str(error).partition(". ")[0]
    return f"its pickle is broken ({type(error).__name__})"


def _refusal(path: Path, beginning: bytes, error: Exception) -> str | None:
    """Return why an intact file is not safe to read, or ``None`` if ``error`` means that the file is damaged."""
    message = str(error)
    if "TorchScript" in message:
        return (
            "is a TorchScript archive, which holds code, not only weights. "
            f"{_REMEDY.replace('(model.', '(torch.jit.load(path).')}"
        )
    if "legacy .tar format" in message:
        return f"has PyTorch's .tar format of 2016, which cannot be read without running code from it. {_REMEDY}"
    asked = _GLOBAL.search(message)
    if asked is None and not (isinstance(error, pickle.UnpicklingError) and _REFUSAL.search(message)):
        return None
    names = _untrusted_names(path) or ([asked.group(1)] if asked else [])
    if not names and not beginning.startswith((_ZIP, _PICKLE)):
        return None
    if not names:
        return (
            "is a pickle that PyTorch's safe reader cannot read, for example because it has protocol 3 or above. Save "
            f"it again with torch.save's default protocol. {_REMEDY}"
        )
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    if any(name.startswith("torch.nn.modules.") for name in names):
        return (
            f"holds a whole pickled nn.Module, not a state dict (its pickle uses {listed}). Reading it would run code "
            f"from the file. {_REMEDY}"
        )
    return (
        f"holds more than tensors and plain data: its pickle uses {listed}, which could run arbitrary code. The file "
        f"was not read. {_REMEDY}"
    )


def _untrusted_names(path: Path) -> list[str]:
    """Return the functions and classes in a checkpoint's pickle that PyTorch does not consider safe; runs nothing."""
    with suppress(Exception), torch.serialization.safe_globals(PLAIN_CLASSES):  # fails on other protocols and damage
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    names: set[str] = set()
    with suppress(Exception):  # if the file is damaged, keep the names found before the damage
        names.update(_names_in_pickle(_pickle_of(path)))
    named = (name for name in names if all(part.isidentifier() for part in name.split(".")))
    return sorted(name for name in named if name != "collections.OrderedDict" and not name.startswith("torch."))


def _pickle_of(path: Path) -> bytes:
    """Return the pickle in a ``torch.save`` archive, or the whole file if it is not an archive."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _names_in_pickle(data: bytes) -> Iterator[str]:
    """Yield each ``module.name`` that a pickle looks up, by reading its instructions without running them."""
    pushed: list[str | None] = []  # the strings on the stack, None for anything else
    memo: dict[object, str | None] = {}
    for instruction, argument, _ in pickletools.genops(data):
        kind = instruction.name
        if kind == "GLOBAL":
            yield str(argument).replace(" ", ".", 1)
        elif kind == "STACK_GLOBAL":
            yield ".".join(part or "?" for part in pushed[-2:])
        elif kind == "MEMOIZE":
            memo[len(memo)] = pushed[-1]
            continue
        elif kind in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = pushed[-1]
            continue
        known = memo.get(argument) if kind in ("GET", "BINGET", "LONG_BINGET") else argument
        pushed.append(known if isinstance(known, str) and kind != "GLOBAL" else None)
