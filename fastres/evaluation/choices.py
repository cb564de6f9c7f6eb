"""From what the user names to candidates: models × dtypes × engines, exported files, and what each is compared with."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fastres.calibration import quantize
from fastres.errors import DeviceError, DtypeError, InputError, MissingDependencyError
from fastres.images.categories import parse as parse_names
from fastres.model.conversion import from_module
from fastres.model.loading import load, parse_device
from fastres.model.model import Model
from fastres.model.predict import require_classifier
from fastres.model.quantized import QuantizedModel
from fastres.network.architectures import ARCHITECTURES
from fastres.text import article, dtype_name

from .candidates import Candidate, check_same_classes, named_apart
from .engines import fastres_candidate, open_engine
from .exported import FILE_ENGINES, open_exported
from .given import AUTO, FASTRES, INT8, check_models, dtype_names, engine_names, float_names, is_exported, named, suffix

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
        self._weights, self._categories = weights, categories
        self._device = None if device is None else parse_device(device)
        self._dtypes, self._engines = dtype_names(dtypes), engine_names(engines)
        self._calibrate_on, self._batch_size, self._progress = calibrate_on, batch_size, progress
        if calibrate_on is not None and INT8 not in self._dtypes:
            raise InputError("calibrate_on was given, but 'int8' is not among dtypes; add it, or leave this out")
        self._models: dict[int, Model] = {}
        self._in_dtype: dict[tuple[int, str], Model] = {}
        self._opened: list[_Opening] = []
        self._left_out: list[tuple[str, str]] = []

    def open(self, models: Any, against: Any) -> Opened:
        """Return the candidates. Raises ``InputError`` if nothing can run, or if they do not fit each other."""
        given_models = named(models)
        check_models([*(given for _, given in given_models), *([] if against is None else [against])], self._weights)
        several = len(given_models) * len(self._dtypes) * len(self._engines or (FASTRES,)) > 1
        for source, (name, given) in enumerate(given_models):
            self._open_all(source, name, given, several)
        if not self._opened:
            raise InputError(f"None of the models can run: {_reasons(self._left_out)}")
        references = {} if against is None else self._references(given_models, against)
        candidates = named_apart([each.candidate for each in self._opened])
        check_same_classes(candidates)
        return Opened(candidates, references, tuple(each.seconds for each in self._opened), tuple(self._left_out))

    # -- models × dtypes × engines ---------------------------------------------------------------------------

    def _open_all(self, source: int, name: str | None, given: Any, several: bool) -> None:
        if is_exported(given):
            own = FILE_ENGINES[suffix(given)]
            engines = [engine for engine in self._engines if engine in own] or [next(iter(own))]
            for engine in engines:
                label = f"{name or os.path.basename(given)} ({engine})"
                self._try(source, several, label, lambda: given, lambda path, on=engine: self._file(path, on, name))
            return
        model = self._loaded(source, given)
        quantized = isinstance(model, QuantizedModel)
        for dtype in [AUTO] if quantized else self._dtypes:
            for engine in self._engines or (FASTRES,):
                label = f"{name or model.architecture.name} {INT8 if quantized else dtype} ({engine})"
                self._try(
                    source, several, label,
                    lambda dtype=dtype: self._in(source, model, dtype),
                    lambda model, engine=engine: self._engine(model, engine, name),
                )  # fmt: skip

    def _try(self, source: int, several: bool, label: str, prepare: Any, build: Any) -> None:
        """Open one candidate and get its first answers. Among several, note one that cannot run here, and go on.

        The time of ``prepare`` is not counted. It returns what ``build`` makes the candidate from.
        """
        try:
            prepared = prepare()
            self._opened.append(self._timed(source, lambda: build(prepared)))
        except (DtypeError, DeviceError, MissingDependencyError) as error:
            if not several:
                raise
            self._left_out.append((label, str(error)))

    def _timed(self, source: int, build: Any) -> _Opening:
        begun = time.perf_counter()
        try:
            candidate: Candidate = build()
            candidate.run(_black(candidate, self.batch_size))
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            raise InputError(
                f"There is not enough memory for a batch of {self.batch_size:,} images; give a smaller batch_size"
            ) from error
        return _Opening(candidate, source, time.perf_counter() - begun)

    def _file(self, path: Any, engine: str | None, name: str | None) -> Candidate:
        found = open_exported(path, engine, batch_size=self.batch_size, most=MOST, device=self._device)
        if self._categories is not None:
            found = replace(found, categories=parse_names(self._categories, found.num_classes))
        return found if name is None else replace(found, name=found.name.replace(os.path.basename(path), name, 1))

    def _engine(self, model: Model, engine: str, name: str | None) -> Candidate:
        if self._device is not None and model.device.type != self._device.type:
            raise DeviceError(
                f"This {model.architecture.name} in {dtype_name(model.dtype)} runs on the {model.device.type.upper()} "
                f"only, but device is {str(self._device)!r}; leave it out"
            )
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
        """Return ``model``, which is that of ``source``, in ``dtype``. The model itself stays as it is."""
        if dtype == AUTO or dtype == dtype_name(model.dtype):
            return model
        if (source, dtype) not in self._in_dtype:
            self._in_dtype[source, dtype] = self._converted(model, dtype)
        return self._in_dtype[source, dtype]

    def _converted(self, model: Model, dtype: str) -> Model:
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
        if isinstance(against, str) and against in float_names():
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
            if is_exported(against):
                self._opened.append(self._timed(source, lambda: self._file(against, None, None)))
            else:
                model = self._loaded(source, against)
                self._opened.append(self._timed(source, lambda: self._engine(model, FASTRES, None)))
        return {other: place for other in range(len(self._opened)) if other != place}


def _reasons(left_out: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in left_out)


def _out_of_memory(error: Exception) -> bool:
    """Return whether an engine lacked memory. On the CPU, torch raises a plain ``RuntimeError``."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def _black(candidate: Candidate, batch_size: int) -> Any:
    crop = candidate.transforms.crop
    if candidate.whole_pictures:
        return [np.zeros((crop, crop, 3), np.uint8)] * batch_size
    pixels = torch.zeros(batch_size, crop, crop, 3, dtype=torch.uint8, device=candidate.device)
    return pixels.permute(0, 3, 1, 2)
