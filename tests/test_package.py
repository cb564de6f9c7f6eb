"""The wheel: one top-level name, its data files, and an import that works from a clean environment."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

DATA = (
    "fastres/py.typed",
    "fastres/data/torchvision_weights.json",
    "fastres/data/imagenet_categories.json",
    "fastres/data/resnet20_digits.safetensors",
    "fastres/data/resnet20_digits.json",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that the checkout's build folder stays out of it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = target.glob("*.whl")
    return built


def test_the_only_top_level_name_is_fastres(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastres"}


def test_data_files_and_subpackages_are_inside(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert set(DATA) <= names
    assert {"fastres/kernels/conv.py", "fastres/bench/eager.py", "fastres/export/__init__.py"} <= names
    assert not [name for name in names if "test" in name]
    packaged = {name for name in names if name.endswith(".py")}
    for folder, package in (("fastres", "fastres"), ("kernels", "fastres/kernels"), ("bench", "fastres/bench")):
        for path in (ROOT / folder).rglob("*.py"):
            relative = path.relative_to(ROOT / folder).as_posix()
            if "/" not in relative:
                assert f"{package}/{relative}" in packaged


@pytest.mark.slow
def test_works_from_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """A new environment with the wheel and, through a path file, this one's dependencies; run from elsewhere."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = (
        "import fastres, fastres.kernels.conv, fastres.bench.eager, fastres.export\n"
        "import numpy as np\n"
        "print(fastres.__file__)\n"
        "print(len(fastres.load('resnet20_digits').predict(np.zeros((8, 8), np.uint8), top_k=3)[0]))\n"
    )
    result = subprocess.run([python, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    path, count = result.stdout.split()
    assert Path(path).is_relative_to(site)
    assert count == "3"
