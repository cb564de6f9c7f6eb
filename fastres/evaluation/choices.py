"""From what the user names to candidates: models × dtypes × engines, exported files, and what each is compared with."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastres.calibration import quantize
from fastres.errors import DeviceError, DtypeError, InputError, MissingDependencyError, near_matches
from fastres.images.categories import parse as parse_names
from fastres.model.conversion import from_module
from fastres.model.loading import load
from fastres.model.model import Model, parse_dtype
from fastres.model.predict import require_classifier
from fastres.model.quantized import QuantizedModel
from fastres.network.architectures import ARCHITECTURES
from fastres.text import article, dtype_name

from .candidates import Candidate
from .engines import ENGINES as OTHERS
from .engines import fastres_candidate, open_engine
from .exported import FILE_ENGINES, open_exported
from .names import column_name

FASTRES = "fastres"
ENGINES = (FASTRES, *OTHERS)
INT8 = "int8"
AUTO = "auto"
MOST = 5  # best classes of an image


@dataclass(frozen=True)
class Opened:
    """The candidates of a run.

    ``references`` has the place of the candidate that another is compared with, by the other's place. ``first`` are the
    seconds from the loaded model or the file to the first answers. ``left_out`` has the name and the reason of each
    combination that cannot run.
    """

    candidates: tuple[Candidate, ...]
    references: Mapping[int, int]
    first: tuple[float, ...]
    left_out: tuple[tuple[str, str], ...]


@dataclass
class _Opening:
    candidate: Candidate
    source: int  # the place of what the user named; −1 for a reference that was named alone
    seconds: float


class Choices:
    """Opens what the user names. The arguments are those of :func:`fastres.evaluate`."""

    def __init__(
        self,
        *,
        weights: Any,
        categories: Any,
        device: torch.device | str | None,
        dtypes: Any,
        engines: Any,
        calibrate_on: Any,
        batch_size: int | None,
        progress: bool,
    ) -> None:
        self._weights, self._categories, self._device = weights, categories, device
        self._dtypes, self._engines = _dtype_names(dtypes), _engine_names(engines)
        self._calibrate_on, self._batch_size, self._progress = calibrate_on, batch_size, progress
        self._models: dict[int, Model] = {}
        self._opened: list[_Opening] = []
        self._left_out: list[tuple[str, str]] = []

    def open(self, models: Any, against: Any) -> Opened:
        """Return the candidates. Raises ``InputError`` if nothing can run, or if they do not fit each other."""
        given_models = named(models)
        several = len(given_models) * len(self._dtypes) * len(self._engines or (FASTRES,)) > 1
        for source, (name, given) in enumerate(given_models):
            self._open_all(source, name, given, several)
        if not self._opened:
            raise InputError(f"None of the models can run: {_reasons(self._left_out)}")
        references = {} if against is None else self._references(given_models, against)
        self._name_apart([given for _, given in given_models])
        candidates = tuple(each.candidate for each in self._opened)
        _check_same_classes(candidates)
        return Opened(candidates, references, tuple(each.seconds for each in self._opened), tuple(self._left_out))

    # -- models × dtypes × engines ---------------------------------------------------------------------------

    def _open_all(self, source: int, name: str | None, given: Any, several: bool) -> None:
        if _is_exported(given):
            own = FILE_ENGINES[_suffix(given)]
            engines = [engine for engine in self._engines if engine in own] or [next(iter(own))]
            for engine in engines:
                label = f"{name or os.path.basename(given)} ({engine})"
                self._try(source, several, label, lambda engine=engine: self._file(given, engine, name))
            return
        model = self._loaded(source, given)
        quantized = isinstance(model, QuantizedModel)
        for dtype in [AUTO] if quantized else self._dtypes:
            for engine in self._engines or (FASTRES,):
                label = f"{name or model.architecture.name} {INT8 if quantized else dtype} ({engine})"
                self._try(
                    source, several, label,
                    lambda dtype=dtype, engine=engine: self._engine(self._in(source, model, dtype), engine, name),
                )  # fmt: skip

    def _try(self, source: int, several: bool, label: str, build: Any) -> None:
        """Open one candidate and get its first answers. Among several, note one that cannot run here, and go on."""
        try:
            self._opened.append(self._timed(source, build))
        except (DtypeError, DeviceError, MissingDependencyError) as error:
            if not several:
                raise
            self._left_out.append((label, str(error)))

    def _timed(self, source: int, build: Any) -> _Opening:
        begun = time.perf_counter()
        candidate: Candidate = build()
        candidate.run(_black(candidate, self.batch_size))
        return _Opening(candidate, source, time.perf_counter() - begun)

    def _file(self, path: Any, engine: str | None, name: str | None) -> Candidate:
        found = open_exported(path, engine, batch_size=self.batch_size, most=MOST)
        if self._categories is not None and found.categories is None:
            found = replace(found, categories=parse_names(self._categories, found.num_classes))
        return found if name is None else replace(found, name=found.name.replace(os.path.basename(path), name, 1))

    def _engine(self, model: Model, engine: str, name: str | None) -> Candidate:
        if engine == FASTRES:
            found = fastres_candidate(model, batch_size=self.batch_size, most=MOST)
        else:
            found = open_engine(model, engine, batch_size=self.batch_size, most=MOST)
        alone = len(self._dtypes) == 1 and len(self._engines) < 2
        return (
            found if name is None else replace(found, name=name if alone else found.name.replace(found.model, name, 1))
        )

    @property
    def batch_size(self) -> int:
        """Images in a batch: as given, or 128 if there is a GPU to run on, else 16."""
        if self._batch_size is not None:
            return self._batch_size
        from fastres.classification import CPU_BATCH, GPU_BATCH

        on_gpu = torch.device(self._given_device()).type == "cuda"
        return GPU_BATCH if on_gpu or any(m.device.type == "cuda" for m in self._models.values()) else CPU_BATCH

    def _given_device(self) -> torch.device | str:
        return self._device or ("cuda" if torch.cuda.is_available() else "cpu")

    def _loaded(self, source: int, given: Any) -> Model:
        if source not in self._models:
            self._models[source] = self._load(given)
            require_classifier(self._models[source], "evaluate")
        return self._models[source]

    def _load(self, given: Any) -> Model:
        own = {"weights": self._weights, "categories": self._categories}
        if isinstance(given, Model):
            if list(own.values()) != ["DEFAULT", None] or self._device is not None:
                raise InputError(
                    "weights, categories or device were given with a loaded model, which has its own; leave them out, "
                    "or pass a model's name"
                )
            return given
        if isinstance(given, nn.Module):
            own["weights"] = None if self._weights == "DEFAULT" else self._weights
            return from_module(given, **own)
        if not isinstance(given, (str, os.PathLike)):
            raise InputError(
                f"A model cannot be {article(given)}; pass a name, a model, or the path of a file that 'fastres "
                "export' or model.save wrote"
            )
        if given not in ARCHITECTURES:  # a file, a folder or a hub id, which has its own weights
            own["weights"] = "DEFAULT"
        model = load(given, **own, progress=self._progress)
        return model if isinstance(model, QuantizedModel) else model.to(self._given_device())

    def _in(self, source: int, model: Model, dtype: str) -> Model:
        """Return ``model`` in ``dtype``. The model itself stays as it is."""
        if dtype == AUTO or dtype == dtype_name(model.dtype):
            return model
        if dtype != INT8:
            return copy.deepcopy(model).to(getattr(torch, dtype))
        if self._calibrate_on is None:
            raise InputError(
                "A model gets its scales in 8 bit from images, which should not be those of the evaluation: pass "
                "calibrate_on (--calibrate-on), or a file that 'fastres quantize' wrote"
            )
        return quantize(model, self._calibrate_on, progress=None if self._progress else False)

    # -- references ------------------------------------------------------------------------------------------

    def _references(self, given: Sequence[tuple[str | None, Any]], against: Any) -> dict[int, int]:
        if isinstance(against, str) and against in _float_names():
            pairs = self._against_dtype(against)
        else:
            pairs = self._against_one(given, against)
        if not pairs:
            raise InputError(
                f"There is nothing to compare with {against!r}: it is the only model. Add another dtype, engine, model "
                "or exported file"
            )
        return pairs

    def _against_dtype(self, dtype: str) -> dict[int, int]:
        """Compare each candidate with the same model in ``dtype``, by fastres."""
        references: dict[int, int] = {}  # by the source
        for source, model in list(self._models.items()):
            if isinstance(model, QuantizedModel):
                continue
            same = (
                place
                for place, each in enumerate(self._opened)
                if (each.source, each.candidate.engine, each.candidate.dtype) == (source, FASTRES, dtype)
            )
            place = next(same, None)
            if place is None:
                place = len(self._opened)
                reference = self._in(source, model, dtype)
                self._opened.append(self._timed(source, lambda m=reference: self._engine(m, FASTRES, None)))
            references[source] = place
        pairs = {}
        for place, each in enumerate(self._opened):
            if place in references.values():
                continue
            fitting = [references[each.source]] if each.source in references else [
                other for other in references.values() if self._opened[other].candidate.model == each.candidate.model
            ]  # fmt: skip
            if len(fitting) != 1:
                raise InputError(
                    f"It is not clear what to compare {each.candidate.name} with: there are {len(fitting)} models of "
                    f"the kind {each.candidate.model} in {dtype}. Name the model that it was made from as well, or "
                    "pass the reference itself as against"
                )
            pairs[place] = fitting[0]
        return pairs

    def _against_one(self, given: Sequence[tuple[str | None, Any]], against: Any) -> dict[int, int]:
        """Compare each candidate with the one that ``against`` names."""
        source = next((s for s, (name, own) in enumerate(given) if against is own or against in (name, own)), None)
        place = next((p for p, each in enumerate(self._opened) if each.source == source), None)
        if place is None:
            place, source = len(self._opened), len(given)
            if _is_exported(against):
                self._opened.append(self._timed(source, lambda: self._file(against, None, None)))
            else:
                model = self._loaded(source, against)
                self._opened.append(self._timed(source, lambda: self._engine(model, FASTRES, None)))
        return {other: place for other in range(len(self._opened)) if other != place}

    def _name_apart(self, given: Sequence[Any]) -> None:
        """Give different names, and different columns, to candidates with the same one."""
        names, columns = set[str](), set[str]()
        for each in self._opened:
            found = each.candidate
            if sum(other.candidate.name == found.name for other in self._opened) > 1:
                found = replace(found, name=f"{found.name}, {os.path.basename(found.weights) or 'random weights'}")
            found = replace(found, name=_unused(found.name, names, " "))
            each.candidate = replace(found, column=_unused(column_name(found.name), columns, "_"))


def _unused(name: str, used: set[str], gap: str) -> str:
    found, number = name, 2
    while found in used:
        found, number = f"{name}{gap}{number}", number + 1
    used.add(found)
    return found


def named(models: Any) -> list[tuple[str | None, Any]]:
    """Return names (``None`` if the user gives none) and models."""
    if isinstance(models, Mapping):
        pairs: list[tuple[str | None, Any]] = [(str(name), given) for name, given in models.items()]
    elif isinstance(models, (str, os.PathLike, nn.Module)):
        pairs = [(None, models)]
    elif isinstance(models, Iterable):
        pairs = [(None, given) for given in models]
    else:
        raise InputError(f"models is {article(models)}; pass a model, or a list or mapping of models")
    if not pairs:
        raise InputError("models is empty; pass a model's name, a model, or the path of an exported file")
    return pairs


def _is_exported(given: Any) -> bool:
    return isinstance(given, (str, os.PathLike)) and _suffix(given) in FILE_ENGINES


def _suffix(path: str | os.PathLike[str]) -> str:
    return Path(os.fsdecode(path)).suffix.lower()


def _float_names() -> tuple[str, ...]:
    return tuple(dtype_name(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))


def _dtype_names(given: Any) -> tuple[str, ...]:
    listed = [given] if isinstance(given, (str, torch.dtype)) or given is None else list(given)
    names = tuple(dict.fromkeys(AUTO if dtype is None else dtype_name(dtype) for dtype in listed))
    for name in names:
        if name != INT8:
            parse_dtype(name)
    if not names:
        raise InputError(f"dtypes is empty; give some of {', '.join((AUTO, *_float_names(), INT8))}")
    return names


def _engine_names(given: Any) -> tuple[str, ...]:
    """Return the engines, or ``()`` if the user gives none."""
    names = (given,) if isinstance(given, str) else tuple(given or ())
    for name in names:
        if name not in ENGINES:
            raise InputError(
                f"There is no engine {name!r}; use {', '.join(ENGINES)}.{near_matches(str(name), ENGINES)}"
            )
    return tuple(dict.fromkeys(names))


def _reasons(left_out: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in left_out)


def _black(candidate: Candidate, batch_size: int) -> Any:
    crop = candidate.transforms.crop
    if candidate.whole_pictures:
        return [np.zeros((crop, crop, 3), np.uint8)] * batch_size
    pixels = torch.zeros(batch_size, crop, crop, 3, dtype=torch.uint8, device=candidate.device)
    return pixels.permute(0, 3, 1, 2)


def _check_same_classes(candidates: Sequence[Candidate]) -> None:
    """Raise ``InputError`` unless all candidates have the same classes."""
    first = candidates[0]
    for other in candidates[1:]:
        if other.num_classes != first.num_classes:
            raise InputError(
                f"{first.name} has {first.num_classes} classes, but {other.name} has {other.num_classes}; evaluate "
                "them in separate runs"
            )
    named = [(each.name, each.categories) for each in candidates if each.categories is not None]
    for name, names in named[1:]:
        own, known = named[0]
        index = next((i for i, pair in enumerate(zip(known, names, strict=True)) if pair[0] != pair[1]), None)
        if index is not None:
            raise InputError(
                f"Class {index} is {known[index]!r} for {own}, but {names[index]!r} for {name}; evaluate them in "
                "separate runs, or give both the same class names"
            )
