"""The arguments of ``fastres.classify`` that determine the rows: checked, and turned into a job."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastres.arguments import whole_number
from fastres.errors import InputError, MissingDependencyError
from fastres.extras import check_dependencies, install
from fastres.images.jpeg import FAST, check_decoder
from fastres.model.loading import load
from fastres.model.model import Model
from fastres.model.predict import require_classifier
from fastres.storage.urls import is_url, url_text
from fastres.text import path_text
from fastres.weights.sources import input_files

from .formats import CSV, JSON_LINES, PARQUET

if TYPE_CHECKING:
    from .job import ClassifyJob

CPU_BATCH, GPU_BATCH = 16, 128
HTML_PICTURES = 300  # thumbnails in a page of results, at most
_MACHINE = ("workers", "device", "batch_size")  # arguments that depend on the machine
Sources = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Request:
    """What is to be classified, with which model and how: arguments of :func:`fastres.classify`, checked.

    It can be pickled if ``model`` is a name.
    """

    source: Sources
    suffix: str  # of the output, in lower case
    model: str | Model = "resnet50"
    weights: str | os.PathLike[str] | None = "DEFAULT"
    top_k: int = 5
    embed: bool = False
    decoder: str = FAST
    batch_size: int | None = None
    workers: int | None = None  # None: one for each core
    device: torch.device | str | None = None
    dtype: torch.dtype | str = "auto"
    categories: Any = None
    image_column: str | None = None
    columns: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the arguments. Raises ``InputError`` and ``MissingDependencyError``; see :func:`fastres.classify`."""
        workers = None if self.workers is None else whole_number(self.workers, "workers", 0)
        checked: dict[str, Any] = {
            "top_k": whole_number(self.top_k, "top_k", 0 if self.embed else 1),
            "batch_size": None if self.batch_size is None else whole_number(self.batch_size, "batch_size"),
            "workers": workers,
            "device": None if self.device is None else str(self.device),
            "columns": tuple(self.columns),
        }
        check_decoder(self.decoder)
        refuse_options_of_loaded(self.model, self.weights, self.dtype, self.device, self.categories)
        if self.suffix == PARQUET:
            check_dependencies("Parquet output", ["pyarrow"], hint=f"Or write {CSV} or {JSON_LINES}, without it")
        check_decoder_package(self.decoder)
        from .batches import checked_workers

        checked_workers(workers)
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the class is frozen

    @property
    def sources(self) -> tuple[str, ...]:
        """The source as a tuple of names."""
        source = self.source
        given = [source] if isinstance(source, (str, os.PathLike)) or not isinstance(source, Iterable) else source
        return tuple(os.fspath(name) if isinstance(name, (str, os.PathLike)) else str(name) for name in given)

    @property
    def source_texts(self) -> list[str]:
        """The source as tables and messages show it."""
        return [path_text(url_text(name) if is_url(name) else name) for name in self.sources]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments as JSON values, to recognise the same command."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _MACHINE}
        values["source"] = self.source_texts
        if isinstance(self.model, Model):
            values["model"] = f"{self.model_name} ({self.model.weights})"
        values["columns"] = list(self.columns)
        return {
            name: each if isinstance(each, (list, int)) or each is None else str(each) for name, each in values.items()
        }

    @property
    def model_name(self) -> str:
        """The name of the model, or the architecture of a loaded one."""
        return self.model.architecture.name if isinstance(self.model, Model) else self.model

    @property
    def input_files(self) -> list[str]:
        """The files that the model is loaded from."""
        return list(map(str, input_files(self.model, self.weights, self.categories)))

    def opened_model(self) -> Model:
        """Return the model. Raises the errors of ``fastres.load``, and ``ClassifierError``."""
        model = self.model
        if not isinstance(model, Model):
            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            model = load(model, self.weights, dtype=self.dtype, device=device, categories=self.categories)
        if self.top_k:
            require_classifier(model, "classify")
        return model

    def job(self, model: Model, batch_size: int | None = None) -> ClassifyJob:
        """Return the job for ``model``. ``batch_size`` is used if the request has none."""
        from .batches import Reading, checked_workers
        from .job import ClassifyJob

        size = self.batch_size or batch_size or (GPU_BATCH if model.device.type == "cuda" else CPU_BATCH)
        return ClassifyJob(
            model,
            Reading(size, checked_workers(self.workers), model.transforms, self.decoder),
            top_k=self.top_k,
            embed=self.embed,
            image_column=self.image_column,
            suffix=self.suffix,
        )


def refuse_options_of_loaded(model: Any, weights: Any, dtype: Any, device: Any, categories: Any) -> None:
    """Raise ``InputError`` if ``model`` is loaded already and one of its options was given as well."""
    if isinstance(model, Model) and ((weights, dtype, device) != ("DEFAULT", "auto", None) or categories is not None):
        raise InputError(
            "weights, dtype, device or categories were given with a loaded model, which has its own; leave them out, "
            "or pass a model's name"
        )


def check_decoder_package(decoder: str, extra: str = "classify") -> None:
    """Raise ``MissingDependencyError`` if the package that ``decoder`` needs is not installed; ``extra`` has it."""
    if decoder == FAST and importlib.util.find_spec("simplejpeg") is None:
        raise MissingDependencyError(
            f"decoder='fast' needs simplejpeg, which is not installed: {install(extra)}. Or use "
            "decoder='exact', which needs only Pillow; it takes longer, and scores differ slightly"
        )
