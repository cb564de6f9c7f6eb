"""Checkpoint files → what they hold, without running code from them.

``.safetensors`` files are read by safetensors, everything else by ``torch.load(weights_only=True)``, which rebuilds
tensors, plain containers and the command lines of training scripts and refuses the rest. What either library says about
a bad file becomes a named error here.
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
OTHER_SUFFIXES = (".th", ".ckpt", ".bin", ".tar")  # of PyTorch files too, in other code bases

# Training scripts (torchvision's, timm's) save their command line beside the weights: attributes, nothing that runs.
PLAIN_CLASSES: list[Any] = [argparse.Namespace]

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # torch.save since 2020 and before
_REMEDY = (
    "If you trust its source, open it there and save the weights alone: torch.save(model.state_dict(), path) or "
    "safetensors.torch.save_file(model.state_dict(), path). Or pass the state dict itself."
)
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_REFUSAL = re.compile(
    r"unrecognized function|can only (create|build|append|extend|setitem)|must be imported|persistent_load|"
    r"unsupported operand",
    re.IGNORECASE,
)


def is_path_like(text: str) -> bool:
    """Whether a string has the form of a path (a checkpoint's suffix, a separator) rather than of a plain name."""
    return is_checkpoint_name(text) or os.sep in text


def is_checkpoint_name(text: str) -> bool:
    """Whether a string ends as the names of checkpoint files do."""
    return Path(text).suffix.lower() in SUFFIXES + OTHER_SUFFIXES


def read_checkpoint(path: Path) -> object:
    """What the checkpoint file holds, its tensors on the CPU; those of a ``.safetensors`` file may be mapped from it.

    Raises ``WeightsError`` where there is no such file or it cannot be read, ``CorruptCheckpointError`` where it is
    truncated, altered or no checkpoint, and ``UnsafeCheckpointError`` where it holds more than tensors and plain data.
    """
    if not path.exists():
        raise WeightsError(f"There is no file {path}. Give the path of a {', '.join(SUFFIXES)} file.")
    if not path.is_file():
        raise WeightsError(f"{path} is not a file. Give the path of a {', '.join(SUFFIXES)} file.")
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
    except Exception as error:  # a damaged file can raise anything: all of it means that the file is unsafe or corrupt
        refusal = _refusal(path, beginning, error)
        if refusal is not None:
            raise UnsafeCheckpointError(f"{path} {refusal}") from error
        raise CorruptCheckpointError(_corrupt(path, "PyTorch checkpoint", _damage(beginning, error))) from error


def _corrupt(path: Path, kind: str, what: str) -> str:
    return (
        f"{path} ({path.stat().st_size:,} bytes) is not a whole {kind}: {what}. It may be truncated, or a page "
        "or pointer saved in the file's place. Fetch or save it again."
    )


def _damage(beginning: bytes, error: Exception) -> str:
    """What is wrong with a damaged file, in a few words."""
    if not beginning:
        return "it is empty"
    if not beginning.startswith((_ZIP, _PICKLE)):
        return f"it begins with {beginning!r}"
    if isinstance(error, RuntimeError):
        return str(error).partition(". ")[0]
    return f"its pickle is broken ({type(error).__name__})"


def _refusal(path: Path, beginning: bytes, error: Exception) -> str | None:
    """Why a file that may be whole is not read; ``None`` where ``error`` speaks of a damaged one."""
    message = str(error)
    if "TorchScript" in message:
        return f"is a TorchScript archive: code, not weights. {_REMEDY.replace('(model.', '(torch.jit.load(path).')}"
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
            "is a pickle that PyTorch's safe reader does not follow, as are those of protocol 3 and above. Save it "
            f"again with torch.save's own protocol. {_REMEDY}"
        )
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    if any(name.startswith("torch.nn.modules.") for name in names):
        return (
            f"holds a whole pickled nn.Module, not a state dict (it asks for {listed}): reading it would run code "
            f"from the file. {_REMEDY}"
        )
    return (
        f"holds more than tensors and plain data: its pickle asks for {listed}, and calling that could run code. "
        f"It was not read. {_REMEDY}"
    )


def _untrusted_names(path: Path) -> list[str]:
    """Functions and classes outside PyTorch's safe subset that a checkpoint's pickle names; nothing is run."""
    with suppress(Exception), torch.serialization.safe_globals(PLAIN_CLASSES):  # an old or new protocol, or damage
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    names: set[str] = set()
    with suppress(Exception):  # what was found before the damage is named
        names.update(_names_in_pickle(_pickle_of(path)))
    named = (name for name in names if all(part.isidentifier() for part in name.split(".")))
    return sorted(name for name in named if name != "collections.OrderedDict" and not name.startswith("torch."))


def _pickle_of(path: Path) -> bytes:
    """The pickle in a ``torch.save`` archive, or the file itself if it is none."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _names_in_pickle(data: bytes) -> Iterator[str]:
    """Each ``module.name`` that a pickle looks up, from its instructions alone."""
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
