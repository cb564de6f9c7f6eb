"""``import fastres`` imports little; each of its names is there when it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fastres

ROOT = Path(__file__).parents[1]


def printed(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.split()


def test_torch_is_imported_when_it_is_needed() -> None:
    code = (
        "import sys, fastres, fastres.commands.cli, fastres.commands.predict, fastres.export.command\n"
        "fastres.FastresError, fastres.__version__, fastres.errors, dir(fastres)\n"
        "fastres.commands.cli._parser()\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules, 'PIL' in sys.modules)\n"
        "fastres.load\n"
        "print('torch' in sys.modules)"
    )
    assert printed(code) == ["False", "False", "False", "True"]


def test_every_name_works_after_import_fastres_alone() -> None:
    code = (
        "import fastres\n"
        "print(fastres.model.Model is fastres.Model, fastres.images.transforms.Transforms is fastres.Transforms)\n"
        "print(callable(fastres.classify), fastres.classification.classify is fastres.classify)\n"
        "print(fastres.look.cam_figure, fastres.export.runtime.Session)\n"
        "print(fastres.weights.entries, fastres.network.architectures, fastres.executors.cpu)"
    )
    assert printed(code)[:4] == ["True"] * 4
    for name in fastres.__all__:
        assert getattr(fastres, name)
        assert name in dir(fastres)
    assert set(dir(fastres)) == {*fastres.__all__, "bench", "export", "look", "ray"}
    for name in (*fastres._FOLDERS, *fastres._FILES):
        assert getattr(fastres, name).__name__ == f"fastres.{name}"


def test_star_import_and_unknown_names() -> None:
    names: dict[str, object] = {}
    exec("from fastres import *", names)
    assert set(fastres.__all__) <= names.keys()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fastres.nothing  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="nothing"):
        exec("from fastres import nothing", {})
    assert not hasattr(fastres, "__wrapped__")


def test_the_help_of_classify_has_the_library_batch_sizes() -> None:
    from fastres.classification import CPU_BATCH, GPU_BATCH
    from fastres.commands.cli import _parser

    text = _parser()._subparsers._group_actions[0].choices["classify"].format_help()  # type: ignore[union-attr,index]
    assert f"{CPU_BATCH}, {GPU_BATCH} on a GPU" in " ".join(text.split())
