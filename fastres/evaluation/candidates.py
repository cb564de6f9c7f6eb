"""What is evaluated: a model, or an exported file, as a function from pixels to its answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastres.errors import InputError
from fastres.images.transforms import Transforms

from .names import column_name


@dataclass(frozen=True)
class Answers:
    """The answers to N images, on the CPU.

    ``indices`` int64 and ``scores`` float32, both ``[N, k]``, are the best classes and their softmax probabilities,
    highest first. ``logits`` is float32 ``[N, classes]``, or ``None`` if the file gives only its best classes.
    """

    indices: Tensor
    scores: Tensor
    logits: Tensor | None

    @classmethod
    def of_logits(cls, logits: Tensor, most: int) -> Answers:
        """Return the answers with these ``logits`` ``[N, classes]``; ``most`` is the number of best classes."""
        logits = logits.detach().to("cpu", torch.float32)
        scores, indices = logits.softmax(1).topk(min(most, logits.shape[1]), dim=1)
        return cls(indices, scores, logits)


@dataclass(frozen=True)
class Candidate:
    """A model or an exported file that is evaluated.

    ``name`` is unique in a run, and so is ``column``, the beginning of the names of its columns. ``transforms`` is its
    preprocessing. ``run`` takes raw RGB, uint8 ``[N, 3, crop, crop]`` in any memory format, on any device, for every N
    from 1 to the batch size. If ``whole_pictures``, the file does its preprocessing itself: ``run`` takes a sequence of
    pictures, uint8 arrays ``[H, W, 3]`` of any size. ``settings`` identify what is computed, as JSON values, so that a
    run is resumed with the same ones only. ``answers`` is the number of best classes that a file gives, ``None`` for
    all. ``layers`` computes values inside the network for
    :mod:`fastres.evaluation.layers`: pixels → float32 ``[N, …]`` by the name of the plan's value. It may be ``None``.
    """

    name: str
    column: str
    model: str
    weights: str
    engine: str
    dtype: str
    transforms: Transforms
    categories: tuple[str, ...] | None
    num_classes: int
    run: Callable[[Any], Answers]
    settings: Mapping[str, Any]
    whole_pictures: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    answers: int | None = None
    layers: Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]] | None = None


def check_same_classes(candidates: Sequence[Candidate]) -> None:
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


def named_apart(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return the candidates with different names and columns: those with one name get their weights, or numbers."""
    names, columns = set[str](), set[str]()
    found = []
    for each in candidates:
        name = each.name
        if len({other.weights for other in candidates if other.name == name}) > 1:
            name = f"{name}, {os.path.basename(each.weights) or 'random weights'}"
        name = _unused(name, names, " ")
        found.append(replace(each, name=name, column=_unused(column_name(name), columns, "_")))
    return tuple(found)


def _unused(name: str, used: set[str], gap: str) -> str:
    found, number = name, 2
    while found in used:
        found, number = f"{name}{gap}{number}", number + 1
    used.add(found)
    return found
