"""The similarity example: its neighbours compared with a plain loop, and the committed record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastres
from fastres.bench.digits import similarity
from fastres.bench.digits.data import load_digits, split

RECORD = Path(__file__).parents[3] / "docs" / "similarity" / "similarity.json"


def test_embeddings_are_the_networks_pooled_features() -> None:
    model = fastres.load(similarity.MODEL)
    images, _ = load_digits()
    vectors = similarity.embeddings(model, images[:300])
    assert vectors.shape == (300, 64)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(300))
    last = model.features(images[299:300])["layer3"].mean((2, 3))[0]
    torch.testing.assert_close(vectors[299], last / last.norm(), rtol=1e-4, atol=1e-5)


def test_neighbours_are_the_training_scans_of_highest_cosine() -> None:
    images, labels = load_digits()
    vectors = torch.nn.functional.normalize(images[:, 0].flatten(1).float())
    found = similarity.compare(vectors, labels)
    train, held_out = split(labels)
    for query in (0, 77, 359):
        cosines = np.array([float(vectors[held_out[query]] @ vectors[index]) for index in train.tolist()])
        np.testing.assert_allclose(np.sort(cosines)[::-1][:5], found.similarities[query].numpy(), rtol=1e-5)
        np.testing.assert_allclose(cosines[found.neighbours[query].numpy()], found.similarities[query], rtol=1e-5)
    right = 360 - len(found.wrong)
    assert found.accuracy.nearest == right
    assert 340 < right < 360, "raw pixels misclassify some"


def test_command_writes_its_record_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert similarity.main(["--out", str(tmp_path / "new")]) == 0
    record = json.loads((tmp_path / "new" / "similarity.json").read_text())
    committed = json.loads(RECORD.read_text())
    assert record["held_out"] == 360
    for kind in ("embeddings", "pixels"):
        assert abs(record[kind]["nearest"] - committed[kind]["nearest"]) <= 1, "another CPU may round a tie differently"
    assert f"nearest {record['embeddings']['nearest']}" in capsys.readouterr().out
    assert Image.open(tmp_path / "new" / "similarity.png").width > 1000


def test_an_unusable_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert similarity.main(["--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
