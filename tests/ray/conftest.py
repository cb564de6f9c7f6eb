"""Fixtures: a table of images, some of them broken, and what ``fastres.classify`` says of it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import fastres

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("ray.data")
pytest.importorskip("simplejpeg")
datasets = pytest.importorskip("sklearn.datasets")

from .cluster import LocalCluster, running  # noqa: E402

BATCH = 4
BROKEN = {3: b"", 5: b"not an image", 6: None}


@pytest.fixture(scope="session")
def model() -> fastres.Model:
    return fastres.load("resnet20_digits")


def jpeg(number: int) -> bytes:
    """Return a scan of a digit as a JPEG of 40 × 40."""
    buffer = io.BytesIO()
    pixels = (_digits()[number] * (255 / 16)).astype("uint8")
    Image.fromarray(pixels).resize((40, 40)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _digits() -> Any:
    return datasets.load_digits().images


@pytest.fixture(scope="session")
def table() -> pa.Table:
    """18 rows with the columns ``id`` and ``image``; of three of them the image is broken, empty or null."""
    images = [BROKEN.get(number, jpeg(number)) for number in range(18)]
    return pa.table({"id": range(18), "image": pa.array(images, pa.binary())})


def classify(table: pa.Table, folder: Path, **options: Any) -> pa.Table:
    """Return the columns that ``fastres.classify`` writes for ``table``, in batches of ``BATCH`` images."""
    pq.write_table(table, folder / "images.parquet")
    output = folder / "classes.parquet"
    fastres.classify(
        folder / "images.parquet",
        output,
        model="resnet20_digits",
        batch_size=BATCH,
        workers=0,
        progress=False,
        **options,
    )
    found = pq.read_table(output).replace_schema_metadata(None)
    return found.drop_columns(["path", "row"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A Ray cluster with two nodes of one core; this process is its driver. Starting it takes about ten seconds."""
    with running() as local:
        yield local
