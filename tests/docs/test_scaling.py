"""The recipes of docs/scaling.md for Slurm and Kubernetes: the commands in them give the table of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import fastres

from .blocks import ROOT, blocks
from .warm import warmed

PAGE = ROOT / "docs" / "scaling.md"
IMAGES = 40
SMALL = "--model resnet20_digits --batch-size 4 --workers 0 --quiet"

# Does what the recipes need of Slurm's sbatch: runs array jobs at once, task by task, and others after the jobs that
# they depend on.
SBATCH = """#!{python}
import os, re, subprocess, sys
arguments = sys.argv[1:]
jobs = os.path.join(os.path.dirname(__file__), "jobs")
if "--wrap" in arguments:
    failed = open(jobs).read().split()
    assert any(a.startswith("--dependency=afterok:7") for a in arguments), arguments
    sys.exit("DependencyNeverSatisfied" if failed else subprocess.call(arguments[-1], shell=True))
script = arguments[-1]
first, last = map(int, re.search(r"#SBATCH --array=([0-9]+)-([0-9]+)", open(script).read()).groups())
failed = []
for task in range(first, last + 1):
    given = dict(SLURM_ARRAY_TASK_ID=str(task))
    if subprocess.call(["bash", script], env=dict(os.environ, **given), stdout=sys.stderr):
        failed.append(str(task))
open(jobs, "w").write(" ".join(failed))
print(7)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``photographs/``, and ``one.parquet``, which one process has written."""
    from PIL import Image
    from sklearn.datasets import load_digits

    place = tmp_path_factory.mktemp("data")
    (place / "photographs").mkdir()
    for number, pixels in enumerate(load_digits().images[:IMAGES]):
        Image.fromarray((pixels * (255 / 16)).astype("uint8")).save(place / "photographs" / f"{number}.png")
    fastres.classify(
        place / "photographs", place / "one.parquet", model="resnet20_digits", batch_size=4, workers=0, progress=False
    )
    return place


@pytest.fixture(scope="module")
def environment(place: Path) -> Iterator[dict[str, str]]:
    """The environment in which ``fastres`` and ``sbatch`` are found."""
    given = {**os.environ, "PYTHONPATH": os.fspath(ROOT)}
    with warmed(place, given) as commands:
        sbatch = commands / "sbatch"
        sbatch.write_text(SBATCH.replace("{python}", sys.executable))
        sbatch.chmod(0o755)
        yield {**given, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}


def test_slurm(place: Path, environment: dict[str, str]) -> None:
    script, submit = (block.code for block in blocks(PAGE) if block.reason == "needs Slurm")
    local = script.replace("/data/", f"{place}/").replace("--quiet", SMALL)
    assert "--array=1-16" in local
    assert "/16" in local
    (place / "classify.sh").write_text(local.replace("--array=1-16", "--array=1-3").replace("/16", "/3"))
    submit = submit.replace("/data/", f"{place}/")
    subprocess.run(["bash", "-ec", submit], cwd=place, env=environment, check=True)
    assert (place / "photographs.parquet").read_bytes() == (place / "one.parquet").read_bytes()


def test_kubernetes(place: Path, environment: dict[str, str]) -> None:
    documents = [yaml.safe_load(block.code) for block in blocks(PAGE) if block.language == "yaml"]
    shards, join = (document["spec"]["template"]["spec"]["containers"][0] for document in documents)
    job = documents[0]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 16, 16)
    assert "))/16 " in shards["args"][0]
    for index in range(3):  # for speed, 3 in the place of 16
        run(shards, place, {**environment, "JOB_COMPLETION_INDEX": str(index)})
    run(join, place, environment)
    assert (place / "kubernetes.parquet").read_bytes() == (place / "one.parquet").read_bytes()


def run(container: dict[str, Any], place: Path, environment: dict[str, str]) -> None:
    """Run the command of a container here, with local paths in the place of URLs, and as one of 3."""
    command = [*container["command"], *container.get("args", [])]
    local = [
        text.replace("s3://bucket/photographs.parquet", f"{place}/kubernetes.parquet")
        .replace("s3://bucket/photographs/", f"{place}/photographs")
        .replace("--quiet", SMALL)
        .replace("))/16", "))/3")
        for text in command
    ]
    assert not any("s3://" in text for text in local)
    subprocess.run(local, env=environment, check=True)
