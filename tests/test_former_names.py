"""Former names of modules that moved into rooms still work in imports, commands and saved models."""

from __future__ import annotations

import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastres
from fastres.aliases import FORMER_NAMES

ROOT = Path(__file__).parents[1]

# The classes in files saved by 0.1.0: a model, its backbone, its plan, its predictions and its explanation.
SAVED = {
    "fastres.architectures": ("Architecture",),
    "fastres.backbone": ("Backbone",),
    "fastres.explain": ("ExplainedStep", "Explanation"),
    "fastres.images": ("Transforms",),
    "fastres.model": ("Model", "Prediction"),
    "fastres.parameters": ("Parameters",),
    "fastres.plan": ("Plan",),
    "fastres.steps": ("Conv", "Head", "Stem"),
}
COMMANDS = (
    "bench.classify", "bench.estimates", "bench.gpu", "bench.host", "bench.predict", "bench.pretend_gpu",
    "bench.report", "bench.run", "bench.similarity", "bench.study", "bench.train_digits", "bench.tune",
    "bench.vetting", "bench.visit.home", "bench.visit.smoke", "fastres", "fastres.bench.run", "fastres.bench.tune",
    "fastres.kernels.inspection", "fastres.kernels.inspection_tables", "fastres.kernels.inspection_tma",
)  # fmt: skip


@pytest.mark.parametrize("former", FORMER_NAMES)
def test_a_former_name_is_the_module_itself(former: str) -> None:
    module = importlib.import_module(former)
    assert module is importlib.import_module(FORMER_NAMES[former])
    assert module.__name__ == FORMER_NAMES[former]


def test_names_in_saved_files() -> None:
    for module, names in SAVED.items():
        for name in names:
            assert isinstance(getattr(importlib.import_module(module), name), type), f"{module}.{name}"


def with_former_names(data: bytes) -> bytes:
    """Return a pickle (protocol 2) whose classes have the modules of :data:`SAVED`."""
    for module, names in SAVED.items():
        for name in names:
            today = getattr(importlib.import_module(module), name).__module__
            data = data.replace(f"c{today}\n{name}\n".encode(), f"c{module}\n{name}\n".encode())
    return data


@pytest.mark.parametrize("what", ["model", "backbone", "plan", "predictions", "explanation"])
def test_a_saved_object_with_former_names_loads(what: str) -> None:
    model = fastres.load("resnet20", None)
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    made = {
        "model": lambda: model,
        "backbone": lambda: fastres.Backbone(model, {"layer1": "0"}),
        "plan": lambda: model.plan,
        "predictions": lambda: model.predict(image),
        "explanation": model.explain,
    }[what]()
    today = pickle.dumps(made, protocol=2)
    former = with_former_names(today)
    assert former != today
    assert not any(f"c{name}\n".encode() in former for name in FORMER_NAMES.values())
    found = pickle.loads(former)
    assert type(found) is type(made)
    if what == "model":
        x = torch.randn(2, 3, 33, 40)
        assert torch.equal(found(x), model(x))
    if what in ("predictions", "explanation"):
        assert found == made


def test_every_command_has_its_former_name() -> None:
    """Each command shows its help. All run in one process, because importing torch takes most of the time."""
    code = (
        "import contextlib, io, json, runpy, sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "said = {}\n"
        "for name in json.loads(sys.argv.pop()):\n"
        "    sys.argv[:] = [name, '--help']\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        try:\n"
        "            runpy.run_module(name, run_name='__main__', alter_sys=True)\n"
        "        except SystemExit as end:\n"
        "            said[name] = [end.code, out.getvalue()]\n"
        "print(json.dumps(said))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(COMMANDS)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    assert list(said) == list(COMMANDS)
    for name, (code, text) in said.items():
        assert not code, name
        assert text.startswith("usage: "), name


@pytest.mark.parametrize("former", ["bench.predict", "fastres.kernels.inspection_tables"])
def test_a_moved_command_runs_by_its_former_name(former: str) -> None:
    wrong = subprocess.run([sys.executable, "-m", former, "--nothing"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--nothing" in wrong.stderr
