"""Weights that several tests load."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastres.weights import published
from fastres.weights.published import get_entry

from .state_dicts import distinct_state


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return distinct_state("resnet20")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A replacement for ResNet-18's published file, in its own cache and registered with its own hash."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = distinct_state("resnet18")
    entry = get_entry("resnet18", "DEFAULT")
    path = tmp_path / "hub" / "checkpoints" / entry.file
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    own = dataclasses.replace(entry, sha256=hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    monkeypatch.setitem(published._torchvision_entries(), "resnet18", {own.name: own})
    return state
