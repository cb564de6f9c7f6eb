"""The deployment page, run as written: its Python code without fastres, and other runtimes on the exported files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastres
from fastres.bench.digits.data import as_image, load_scans

pytest.importorskip("onnx")

from fastres.export import onnx as fx
from fastres.export.metadata import KEYS
from fastres.export.openvino_core import core
from fastres.export.pytorch import export_torch
from tests.measures import relative_error

from .networks import digits_model, network

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
WITHOUT_FASTRES = "import sys\nsys.modules['fastres'] = None\n"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def run_alone(code: str, folder: Path) -> str:
    """Return the output of ``code`` in a new interpreter, in ``folder``, in which importing fastres raises."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_FASTRES + code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_fastres_would_fail(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        run_alone("import fastres.export", tmp_path)


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a scanned 7 under the page's name for a picture."""
    folder = tmp_path_factory.mktemp("deployment")
    scans, digits = load_scans()
    (folder / "photographs").mkdir()
    as_image(scans[int(np.flatnonzero(digits == 7)[3])]).save(folder / "photographs" / "cat.jpg", quality=100)
    return folder


def test_onnxruntime_lines(digit: Path) -> None:
    (code,) = [block for block in python_blocks() if 'meta["resize"]' in block]
    fx.export("resnet20_digits", digit / "resnet50.onnx", progress=False)
    assert run_alone(code, digit) == "7"


def test_onnxruntime_lines_compute_the_models_logits(tmp_path: Path) -> None:
    """Uses a picture that is resized and cropped by the page's own code."""
    known = network("resnet18")
    fx.export(known.model, tmp_path / "resnet50.onnx", verify=False, progress=False)
    picture = np.random.default_rng(0).integers(0, 256, (301, 413, 3), dtype=np.uint8)
    (tmp_path / "photographs").mkdir()
    Image.fromarray(picture).save(tmp_path / "photographs" / "cat.png")
    (code,) = [block for block in python_blocks() if 'meta["resize"]' in block]
    code = code.replace("cat.jpg", "cat.png").replace("print(names[int(logits[0].argmax())])", 'np.save("y", logits)')
    run_alone(code, tmp_path)
    expected = known.model(known.model.transforms(Image.fromarray(picture))[None])
    assert relative_error(torch.from_numpy(np.load(tmp_path / "y.npy")), expected) < 1e-5


def test_preprocessing_lines(digit: Path) -> None:
    (code,) = [block for block in python_blocks() if "top_k_scores" in block]
    fx.export("resnet20_digits", digit / "resnet50_pictures.onnx", preprocessing=True, outputs="top_k", progress=False)
    lines = run_alone(code, digit).splitlines()
    expected = digits_model().predict(digit / "photographs" / "cat.jpg")
    assert [line.split() for line in lines] == [[p.label, f"{p.score:.1%}"] for p in expected]


def test_torch_lines(tmp_path: Path) -> None:
    (code,) = [block for block in python_blocks() if "torch.export.load" in block]
    export_torch(digits_model(), tmp_path / "resnet18.pt2", image_size=224, progress=False, verify=False)
    assert run_alone(code + "print(list(logits.shape))", tmp_path) == "[2, 10]"


def test_page_names_every_metadata_key() -> None:
    for key in KEYS:
        assert f"`{key}`" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["resnet18", "resnet20_digits"])
def test_openvino_reads_and_agrees(name: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    known = network(name)
    path = tmp_path / "model.onnx"
    fx.export(known.model, path, image_size="dynamic", progress=False)
    compiled = core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    known.check(lambda x: torch.from_numpy(compiled([x.numpy()])[compiled.output(0)]))


def test_openvino_preprocesses(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = tmp_path / "model.onnx"
    fx.export("resnet20_digits", path, preprocessing=True, progress=False)
    compiled = core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    picture = np.random.default_rng(1).integers(0, 256, (75, 61, 3), dtype=np.uint8)
    logits = torch.from_numpy(compiled([picture[None]])[compiled.output(0)])
    model = fastres.load("resnet20_digits", dtype="float32")
    assert relative_error(logits, model(model.transforms(picture)[None])) < 2e-2
