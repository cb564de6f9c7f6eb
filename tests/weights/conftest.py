"""Weights that several tests load."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastres.weights import published
from fastres.weights.published import get_entry

from .hub_server import ID, PROCESSOR, Files, HubServer, Repository, running, use
from .other_libraries import SMALL, Logits, live_transformers
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


@pytest.fixture(scope="module")
def small() -> Logits:
    pytest.importorskip("transformers")
    return live_transformers(**SMALL)


@pytest.fixture(scope="module")
def folder(small: Logits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which transformers saved the small network."""
    folder = tmp_path_factory.mktemp("saved")
    small.module.save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.fixture
def files(folder: Path) -> Files:
    """The files of a repository: the saved model, its preprocessing, and others."""
    others = dict.fromkeys(("README.md", "tf_model.h5", "flax_model.msgpack"), b"not needed")
    processor = {"preprocessor_config.json": json.dumps(PROCESSOR).encode()}
    return {**{path.name: path.read_bytes() for path in folder.iterdir()}, **others, **processor}


@pytest.fixture
def hub(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with one model, which huggingface_hub asks. Its cache is empty."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with running() as server:
        server.repositories[ID] = Repository()
        server.repositories[ID].commit(files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        use(server.url, monkeypatch)
        yield server
