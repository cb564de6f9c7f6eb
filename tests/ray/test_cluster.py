"""fastres.ray on a real cluster of two nodes. All tests that need a cluster are in this file, which starts it once."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import fastres
from fastres.commands.cli import main

from .cluster import LocalCluster, kill, processes, title, until
from .conftest import BATCH, classify, jpeg
from .reporting import Reporting

pytestmark = pytest.mark.slow
OPTIONS: dict[str, Any] = {"model": "resnet20_digits", "top_k": 2}
RUN: dict[str, Any] = {"model": "resnet20_digits", "batch_size": 4, "workers": 0}


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 images, four of them broken."""
    place = tmp_path_factory.mktemp("images")
    for number in range(240):
        (place / f"{number:03}.jpg").write_bytes(b"broken" if number % 60 == 7 else jpeg(number))
    return place


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The table that one process writes."""
    output = tmp_path_factory.mktemp("whole") / "whole.parquet"
    fastres.classify(folder, output, **RUN, device="cpu", progress=False)
    return output.read_bytes()


def driver_of(cluster: LocalCluster, folder: Path, output: Path, actors: int = 4) -> subprocess.Popen[str]:
    """Start a program that prints its node, classifies ``folder`` with ``actors``, and prints its report."""
    code = f"""
import fastres
print(ray.get_runtime_context().get_node_id(), flush=True)
print(fastres.ray.classify({str(folder)!r}, {str(output)!r}, **{RUN!r}, actors={actors}, progress=False))
"""
    return cluster.driver(code)


def actors_of(cluster: LocalCluster, run: Path, actors: int = 4) -> list[int]:
    """Return the processes of the actors that work on the run in this folder, when all have started."""
    found: list[int] = []

    def there() -> bool:
        found[:] = [pid for pid in processes(cluster.folder) if "ShardActor" in title(pid)]
        return len(found) == actors

    until(lambda: (run / "manifest.json").exists())
    until(there)
    return found


class TestClassify:
    """``fastres.ray.classify`` writes the table of one process, whatever dies on the way."""

    def test_killed_actors_and_a_lost_node(
        self, cluster: LocalCluster, folder: Path, tmp_path: Path, whole: bytes
    ) -> None:
        output = tmp_path / "out.parquet"
        with driver_of(cluster, folder, output) as driver:
            actors = actors_of(cluster, partial(output))
            assert driver.stdout is not None
            own = driver.stdout.readline().strip()  # whose loss would end the driver
            lost = next(node for node in map(cluster.node_of, actors) if node.node_id != own)
            kill(next(pid for pid in actors if cluster.node_of(pid) is not lost))
            cluster.kill_node(lost)
            assert "240 rows, 4 with errors" in driver.communicate()[0]
        cluster.restore()
        assert output.read_bytes() == whole
        assert not partial(output).exists()

    def test_a_killed_driver_and_then_two_at_once(
        self, cluster: LocalCluster, folder: Path, tmp_path: Path, whole: bytes
    ) -> None:
        output = tmp_path / "out.parquet"
        with driver_of(cluster, folder, output, 2) as driver:
            actors = actors_of(cluster, partial(output), 2)
            driver.kill()
        until(lambda: not set(actors) & set(processes(cluster.folder)))
        assert not output.exists()
        with driver_of(cluster, folder, output, 2) as one, driver_of(cluster, folder, output, 2) as two:
            said = one.communicate()[0], two.communicate()[0]
        assert all("240 rows" in text and "4 with errors" in text for text in said)
        assert output.read_bytes() == whole
        assert not partial(output).exists()

    def test_a_terminated_command_says_what_is_kept(self, cluster: LocalCluster, folder: Path, tmp_path: Path) -> None:
        """Schedulers end programs by SIGTERM, for which Ray has a handler that aborts them."""
        output = tmp_path / "out.parquet"
        command = [sys.executable, "-m", "fastres", "classify", folder, "-o", output, "--model", "resnet20_digits"]
        command += ["--ray", cluster.address, "--actors", "2", "--batch-size", "2", "--workers", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
            actors_of(cluster, partial(output), 2)
            program.terminate()
            said = program.communicate()[1]
        assert program.returncode == 128 + signal.SIGTERM, said
        assert "fastres: interrupted by SIGTERM: " in said
        assert "rows are kept in" in said

    def test_the_command_and_errors(
        self, cluster: LocalCluster, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        common = ["--model", "resnet20_digits", "--ray", "--quiet"]
        assert main(["classify", str(folder / "000.jpg"), "-o", str(tmp_path / "one.csv"), *common]) == 0
        assert "one.csv: 1 rows, 0 with errors" in capsys.readouterr().out
        two = ["classify", str(folder / "001.jpg"), "-o", str(tmp_path / "two.csv"), "--model", "resnet20_digits"]
        assert main([*two, "--quiet", "--shard", "1/1"]) == 0
        assert main([*two, "--quiet", "--ray"]) == 0, "all rows are finished, and the table is missing"
        assert "two.csv: 1 rows, all of them computed earlier" in capsys.readouterr().out
        (tmp_path / "empty").mkdir()
        assert main(["classify", str(tmp_path / "empty"), "-o", str(tmp_path / "out.csv"), *common]) == 2
        assert main(["classify", str(folder), "-o", str(tmp_path / "out.csv"), *common, "--actors", "9"]) == 2
        assert main(["classify", str(folder), "-o", str(tmp_path / "out.csv"), *common, "--ray", "127.0.0.3:1"]) == 2
        said = capsys.readouterr().err
        assert "There are no images in" in said
        assert "The cluster has room for 4 actors with 1 cores and 0 GPUs each (3 nodes with 4 cores" in said, said
        assert "Ray is already connected to" in said
        tables = [name for table in ("one.csv", "two.csv") for name in (table, f"{table}.manifest.json")]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", *tables]


def partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


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
