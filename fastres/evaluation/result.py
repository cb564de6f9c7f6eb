"""The result of an evaluation: what ``fastres.evaluate`` returns, as data, as JSON and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastres import markup
from fastres.pages.words import ClassNames, between, count
from fastres.terminal import terminal_width
from fastres.text import path_text, text_table

from .agreement import Agreement
from .findings import doubts
from .metrics import Accuracy, Paired
from .speed import Speed


@dataclass(frozen=True)
class Mistake:
    """An image whose answer is not its label: class indices, and the softmax probabilities of both."""

    row: int
    name: str
    label: int
    predicted: int
    score: float
    label_score: float | None


@dataclass(frozen=True)
class Disagreement:
    """An image that a model and its reference put in different classes, ``predicted`` and ``reference``."""

    row: int
    name: str
    label: int | None
    reference: int
    reference_score: float
    predicted: int
    score: float
    logit_error: float | None


@dataclass(frozen=True)
class ModelResult:
    """What was measured of one model, dtype, engine or exported file.

    ``accuracy`` is ``None`` without labels, ``agreement`` without a reference. Both are ``None`` if no image could be
    read. ``paired`` compares the model with the most accurate one, image by image. ``mistakes`` are the most confident
    ones, and so are ``disagreements``.
    """

    name: str
    model: str
    weights: str
    engine: str
    dtype: str
    transforms: Mapping[str, Any]
    accuracy: Accuracy | None
    paired: Paired | None
    agreement: Agreement | None
    speed: Speed | None
    mistakes: tuple[Mistake, ...]
    disagreements: tuple[Disagreement, ...]


@dataclass(frozen=True)
class LabelFacts:
    """Where the labels came from, and how they became class indices (``text`` is a sentence).

    ``missing`` are the classes without an image that could be read.
    """

    source: str
    order: str
    text: str
    missing: tuple[int, ...]


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be read."""

    row: int
    name: str
    error: str


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The result of :func:`fastres.evaluate`.

    ``models`` has the results, in the order in which the models were given; ``evaluation["resnet50 bfloat16"]`` finds
    one by its name. ``images`` were measured. ``unreadable`` others could not be read: they take no part in any figure,
    and ``errors`` names the first of them. ``skipped`` images have no row (hidden names, further
    images of a tar sample). ``output`` is the folder with ``report.html``, ``evaluation.json`` and ``images.parquet``.
    ``left_out`` are combinations that could not run, with the reason.
    """

    source: tuple[str, ...]
    kind: str
    images: int
    unreadable: int
    skipped: int
    resumed: int
    errors: tuple[Unreadable, ...]
    labels: LabelFacts | None
    class_names: tuple[str, ...]
    models: tuple[ModelResult, ...]
    left_out: tuple[tuple[str, str], ...]
    decoder: str
    batch_size: int
    seconds: float
    machine: Mapping[str, Any]
    fastres: str
    date: str
    output: Path | None = None

    def __getitem__(self, name: str) -> ModelResult:
        for each in self.models:
            if each.name == name:
                return each
        raise KeyError(f"There is no result for {name!r}; there are {', '.join(repr(m.name) for m in self.models)}")

    def document(self) -> dict[str, Any]:
        """Return everything as JSON values, with ``None`` in place of NaN and infinity."""
        references = {each.agreement.reference for each in self.models if each.agreement is not None}
        document = {
            **asdict(self),
            "output": None if self.output is None else path_text(self.output),
            "reference": references.pop() if len(references) == 1 else None,
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
        }
        return {key: _finite(value) for key, value in document.items()}

    def __str__(self) -> str:
        lines = [self._images_text()]
        if self.labels is not None:
            lines.append(self.labels.text)
            if self.labels.missing:
                lines.append(_missing_text(self.labels.missing, self.class_names, bool(self.unreadable)))
        lines += [
            "",
            text_table(self._table(), right=range(1, 20), width=terminal_width()),
        ]
        lines += [f"left out: {name}: {reason}" for name, reason in self.left_out]
        lines += [
            f"no answer: {each.name} gives NaN for {count(each.accuracy.unanswered, 'image')}, which count as wrong"
            for each in self.models
            if each.accuracy is not None and each.accuracy.unanswered
        ]
        lines += [f"doubt: {text}" for text in doubts(self.document(), ClassNames(self.class_names))]
        if self.output is not None:
            lines += ["", f"report: {path_text(self.output / 'report.html')}"]
        return "\n".join(lines)

    def __repr__(self) -> str:
        place = "" if self.output is None else f", in {path_text(self.output)}"
        return f"Evaluation({', '.join(each.name for each in self.models)} on {count(self.images, 'image')}{place})"

    def _repr_html_(self) -> str:
        return markup.table(self._table(), right=range(1, 20), title=self._images_text())

    def _images_text(self) -> str:
        text = count(self.images, "image")
        if self.unreadable:
            first = self.errors[0]
            text += f", and {self.unreadable:,} that could not be read (the first: {first.name}: {first.error})"
        if self.skipped:
            text += f"; {self.skipped:,} skipped (hidden, or not first in their sample)"
        return text

    def _table(self) -> list[Sequence[str]]:
        accuracies = any(each.accuracy is not None for each in self.models)
        top5 = any(each.accuracy is not None and each.accuracy.top5 is not None for each in self.models)
        agreements = any(each.agreement is not None for each in self.models)
        header = ["model"]
        if accuracies:
            header += ["top-1", "95 % interval", *(["top-5"] if top5 else []), "balanced", "NLL", "ECE"]
        header += ["same class", "logit error"] if agreements else []
        rows: list[Sequence[str]] = [[*header, "images/s", "first answer"]]
        for each in self.models:
            cells = [each.name]
            if accuracies:
                cells += _accuracy_cells(each.accuracy, top5)
            if agreements:
                found = each.agreement
                cells += ["reference" if found is None else _percent(found.same_class),
                          "" if found is None or found.logit_error is None else f"{found.logit_error:.2%}"]  # fmt: skip
            speed = each.speed
            cells += ["" if speed is None else _rate(speed.images_per_s)]
            cells += ["" if speed is None else f"{speed.first_answer_s:.2f} s"]
            rows.append(cells)
        return rows


def _accuracy_cells(found: Accuracy | None, top5: bool) -> list[str]:
    if found is None:
        return [""] * (6 if top5 else 5)
    cells = [_percent(found.top1), between(found.top1_low, found.top1_high, 2)]
    if top5:
        cells.append("" if found.top5 is None else _percent(found.top5))
    nll = "" if found.nll is None else f"{found.nll:.3f}"
    return [*cells, _percent(found.balanced), nll, "" if found.ece is None else _percent(found.ece)]


def _percent(share: float) -> str:
    return f"{share:.2%}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _missing_text(missing: Sequence[int], names: Sequence[str], some_unreadable: bool) -> str:
    shown = ", ".join(names[index] for index in missing[:5])
    more = f" and {len(missing) - 5:,} others" if len(missing) > 5 else ""
    what = f"{count(len(names), 'class', 'classes')} {'has' if len(missing) == 1 else 'have'}"
    return f"{len(missing):,} of {what} no images{' that could be read' * some_unreadable}: {shown}{more}"


def _finite(value: Any) -> Any:
    """Return JSON values with ``None`` in place of NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value
