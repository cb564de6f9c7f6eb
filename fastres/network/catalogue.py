"""The models by name, size and published weights: what ``fastres list`` and ``fastres.list_models`` show.

The facts are in ``data/models.json``, so that nothing needs torch to show them. ``python docs/mkdocs/generate.py``
writes that file from the architectures and the table of published weights.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import resources
from typing import Any

from fastres.errors import InputError

FILE = ("data", "models.json")


@functools.cache
def models() -> tuple[dict[str, Any], ...]:
    """Return the facts of each model, in the order of the family.

    ``model`` is its name, ``parameters`` their number, ``gflop`` two per multiply-accumulate of one image, and
    ``image_size`` that image's side in pixels. ``weights`` maps the names of published weights to ``acc1`` (top-1
    accuracy in percent), ``default`` and ``megabytes``.
    """
    return tuple(json.loads(resources.files("fastres").joinpath(*FILE).read_text(encoding="utf-8")))


def matching(pattern: str | Sequence[str] = "*", *, pretrained: bool = False) -> list[dict[str, Any]]:
    """Return the facts of the models that :func:`list_models` lists."""
    patterns = [pattern] if isinstance(pattern, str) else list(pattern) if isinstance(pattern, Sequence) else [pattern]
    if not all(isinstance(each, str) for each in patterns):
        raise InputError(f"pattern is {pattern!r:.80}; give a pattern such as 'resnet5*', or a list of patterns")
    return [
        facts
        for facts in models()
        if any(fnmatchcase(facts["model"], each) for each in patterns) and (facts["weights"] or not pretrained)
    ]


def list_models(pattern: str | Sequence[str] = "*", *, pretrained: bool = False) -> list[str]:
    """Return the names that :func:`fastres.load` accepts, in the order of the family.

    ``pattern`` is a shell pattern, or a list of several: ``"resnet5*"``, ``["resnet*d", "wide_*"]``. With
    ``pretrained``, only models with published weights are listed. If none matches, the list is empty.

    >>> fastres.list_models("*50*", pretrained=True)
    ['resnet50', 'resnext50_32x4d', 'wide_resnet50_2']

    Raises ``InputError`` if a pattern is no text.
    """
    return [facts["model"] for facts in matching(pattern, pretrained=pretrained)]
