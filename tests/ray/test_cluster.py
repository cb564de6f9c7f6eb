"""fastres.ray on a real cluster of two nodes. All tests that need a cluster are in this file, which starts it once."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import fastres

from .cluster import LocalCluster, kill, processes, until
from .conftest import BATCH, classify
from .reporting import Reporting
from .slow import Slow

pytestmark = pytest.mark.slow
OPTIONS: dict[str, Any] = {"model": "resnet20_digits", "top_k": 2}


def dataset(table: pa.Table, blocks: int) -> ray.data.Dataset:
    size = -(-len(table) // blocks)
    return ray.data.from_arrow([table[start : start + size] for start in range(0, len(table), size)])


@pytest.mark.parametrize("format", ["numpy", "pandas", "pyarrow"])
def test_rows_are_those_of_classify(cluster: LocalCluster, table: pa.Table, tmp_path: Path, format: str) -> None:
    """Also after they were written by several tasks, of which some saw no error and some nothing else."""
    embed = format != "numpy"  # where it is a tensor
    expected = classify(table, tmp_path, top_k=2, embed=embed)
    found = dataset(table, blocks=5).map_batches(
        fastres.ray.Classifier, fn_constructor_kwargs={**OPTIONS, "embed": embed, "drop_images": True},
        batch_size=BATCH, batch_format=format, compute=ray.data.ActorPoolStrategy(size=1),
    )  # fmt: skip
    found.write_parquet(str(tmp_path / "out"))
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) > 1
    assert len({str(pq.read_schema(path).remove_metadata()) for path in files}) == 1
    rows = pq.read_table(tmp_path / "out").replace_schema_metadata(None).sort_by("id")
    assert rows.drop_columns(["id"]).equals(expected)
    assert 0 < expected["error"].null_count < len(expected)


def rows_of(table: pa.Table, kind: type, **options: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows that an actor of this ``kind`` makes of ``table``, block by block, while it works on the next."""
    pool = ray.data.ActorPoolStrategy(size=1)
    found = dataset(table, blocks=9).map_batches(kind, batch_size=2, compute=pool, num_cpus=2, **options)
    for block in found.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from block.to_pylist()


def test_threads_fit_the_cores_and_a_killed_actor_costs_no_row(cluster: LocalCluster, table: pa.Table) -> None:
    rows: list[dict[str, Any]] = []
    killed = None
    for row in rows_of(table, Reporting, fn_constructor_kwargs=OPTIONS):
        rows.append(row)
        if killed is None:
            killed = row["pid"]
            kill(killed)
    assert sorted(row["id"] for row in rows) == list(range(len(table)))
    assert {row["pid"] for row in rows} > {killed}
    assert {row["torch_threads"] for row in rows} == {row["decoders"] for row in rows} == {2}


def test_a_lost_node_costs_no_row(cluster: LocalCluster, table: pa.Table) -> None:
    rows: list[dict[str, Any]] = []
    for row in rows_of(table.drop_columns(["image"]), Slow):
        rows.append(row)
        if len(rows) == 1:
            cluster.kill_node(next(node for node in cluster.nodes if node.node_id == row["node"]))
    cluster.restore()
    assert sorted(row["id"] for row in rows) == list(range(len(table)))
    assert len({row["node"] for row in rows}) == 2


def test_the_actors_of_a_killed_driver_end(cluster: LocalCluster) -> None:
    code = """
        import os, time

        class Slow:
            def __call__(self, batch):
                print(os.getpid(), file=open(PATH, "w"), flush=True)
                time.sleep(600)

        ray.data.range(1).map_batches(Slow, compute=ray.data.ActorPoolStrategy(size=1)).materialize()
    """
    path = cluster.folder / "pid"
    driver = cluster.driver(textwrap.dedent(code).replace("PATH", repr(str(path))))
    until(lambda: path.exists() and path.read_text().endswith("\n"))
    actor = int(path.read_text())
    assert actor in processes(cluster.folder)
    driver.kill()
    driver.wait()
    until(lambda: actor not in processes(cluster.folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"device": "cuda"}, "Ray has assigned no GPU to this actor"), ({"image_column": "x"}, "no column 'x'")],
)
def test_errors_reach_the_driver(cluster: LocalCluster, table: pa.Table, options: dict[str, Any], message: str) -> None:
    found = ray.data.from_arrow(table).map_batches(
        fastres.ray.Classifier, fn_constructor_kwargs={**OPTIONS, **options}, compute=ray.data.ActorPoolStrategy(size=1)
    )
    with pytest.raises(ray.exceptions.RayError, match=message):
        found.materialize()
