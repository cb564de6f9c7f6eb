"""The command that installs an extra is one that works here: in a checkout, elsewhere, and after an installation."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastres
from fastres import extras
from fastres.errors import MissingDependencyError
from fastres.model.derived import check_device

ROOT = Path(__file__).parents[1]


def test_in_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert extras.install("onnx") == "pip install -e '.[onnx]'"
    monkeypatch.chdir(tmp_path)
    place = shlex.split(extras.install("onnx"))[-1]
    assert (Path(place.removesuffix("[onnx]")) / "pyproject.toml").is_file()


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (None, "pip install 'fastres[look]'"),
        ('{"url": "https://example.com/fastres.whl", "archive_info": {}}', "pip install 'fastres[look]'"),
        ('{"url": "file:///nowhere/at/all", "dir_info": {}}', "pip install 'fastres[look]'"),
        ('{"url": "file://FOLDER/my%20project", "dir_info": {}}', "pip install 'FOLDER/my project[look]'"),
    ],
    ids=["index", "archive", "a folder that is gone", "a folder"],
)
def test_after_an_installation(facts: str | None, expected: str, tmp_path: Path) -> None:
    (tmp_path / "my project").mkdir()
    (tmp_path / "my project" / "pyproject.toml").touch()
    site = tmp_path / "site"
    info = site / "fastres-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastres\nVersion: 0.1.0\n")
    if facts:
        (info / "direct_url.json").write_text(facts.replace("FOLDER", str(tmp_path)))
    package = site / "fastres"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("extras.py", "errors.py"):
        (package / name).write_text((ROOT / "fastres" / name).read_text())
    code = "from fastres.extras import install; print(install('look'))"
    variables = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected.replace("FOLDER", str(tmp_path))


def test_a_gpu_needs_triton_and_a_cpu_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest))
    check_device(torch.device("cpu"))
    with pytest.raises(MissingDependencyError, match=r"Kernels for a GPU need Triton.*CUDA builds of torch bring it"):
        check_device(torch.device("cuda:0"))


def test_a_cpu_runs_everything_without_triton(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import fastres, torch\n"
        "model = fastres.load('resnet20_digits')\n"
        "model(torch.zeros(2, 3, 32, 32)); model.explain(); model.warmup(); model.bfloat16()\n"
        "from fastres.commands.cli import main\n"
        "sys.exit(main(['env']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert fastres.__version__ in done.stdout
