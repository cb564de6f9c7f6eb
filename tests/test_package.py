"""One import name in the checkout, in a wheel and in the source distribution; and the contents of these."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "export", "bench")  # folders of the checkout's root, imported as fastres.NAME

DATA = (
    "fastres/py.typed",
    "fastres/data/torchvision_weights.json",
    "fastres/data/imagenet_categories.json",
    "fastres/data/resnet20_digits.safetensors",
    "fastres/data/resnet20_digits.json",
    "fastres/bench/report/report.html.jinja",
    "fastres/evaluation/report.html.jinja",
    "fastres/pages/style.css.jinja",
    "fastres/classification/browsing/browse.html.jinja",
    "fastres/classification/browsing/browse.css.jinja",
    "fastres/classification/browsing/browse.js.jinja",
    "fastres/evaluation/report_model.html.jinja",
    "fastres/evaluation/report_macros.html.jinja",
)
IMPORTS = "import fastres.kernels.conv, fastres.export.onnx, fastres.bench.run"

not_from_git = shutil.ignore_patterns(".git", ".venv", "build", "dist", "out", "*.egg-info", "__pycache__", ".*_cache")


def python(code: str, cwd: Path, executable: str | Path = sys.executable, **variables: str) -> str:
    done = subprocess.run(
        [executable, "-c", code], cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with their links, so that the checkout's build folder does not affect the build."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "fastres", symlinks=True, ignore=not_from_git))


@pytest.fixture(scope="module")
def built(checkout: Path) -> tuple[Path, Path]:
    """The source distribution built from the checkout, and the wheel built from the source distribution."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(checkout.parent), str(checkout)]
    subprocess.run(command, check=True, capture_output=True)
    (source,), (wheel,) = checkout.parent.glob("*.tar.gz"), checkout.parent.glob("*.whl")
    return source, wheel


def modules(folder: Path) -> set[str]:
    """Return the Python files in ``fastres/``, including those behind links, by their path from ``folder``."""
    found = set()
    for place, folders, files in os.walk(folder / "fastres", followlinks=True):
        packages = [name for name in folders if (Path(place) / name / "__init__.py").exists()]
        folders[:] = packages
        found |= {(Path(place) / name).relative_to(folder).as_posix() for name in files if name.endswith(".py")}
    return found


def test_the_wheel_holds_every_module_and_its_data(built: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(built[1]).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastres"}
    expected = modules(ROOT)
    assert {"fastres/kernels/conv.py", "fastres/bench/study/__main__.py", "fastres/export/onnx.py"} <= expected
    assert {name for name in names if name.endswith(".py")} == expected
    assert set(DATA) <= names
    assert not [name for name in names if "test" in name]


def test_the_source_distribution_holds_the_whole_repository(built: tuple[Path, Path], checkout: Path) -> None:
    with tarfile.open(built[0]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    folders = ("fastres", *PACKAGES, "tests", "docs", ".ci", ".github")
    there = {path.relative_to(checkout) for folder in folders for path in (checkout / folder).rglob("*")}
    there = {path.as_posix() for path in there if (checkout / path).is_file()}
    there |= {
        "Makefile",
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "constraints.txt",
        "pyproject.toml",
    }
    assert {"tests/test_package.py", "docs/index.md", "kernels/conv.py", "fastres/version.py"} <= there
    assert there - names == set()
    assert modules(checkout) <= names


@pytest.mark.slow
def test_the_wheel_works_from_a_clean_environment(built: tuple[Path, Path], tmp_path: Path, checkout: Path) -> None:
    """A new environment with the wheel and, through a path file, the dependencies of this environment.

    Imported from elsewhere, fastres is the installed package. From the checkout's root, it is entirely the checkout's.
    """
    venv.create(tmp_path / "env", with_pip=False)
    executable = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = (
        f"{IMPORTS}\n"
        "import numpy as np\n"
        "print(fastres.__file__)\n"
        "print(len(fastres.load('resnet20_digits').predict(np.zeros((8, 8), np.uint8), top_k=3)))\n"
    )
    path, count = python(code, tmp_path, executable).split()
    assert Path(path).is_relative_to(site)
    assert count == "3"
    found = python(f"{IMPORTS}; print(fastres.bench.run.__file__)", checkout, executable)
    assert Path(found.strip()) == checkout / "fastres" / "bench" / "run.py"


def test_the_checkout_is_imported_with_nothing_installed(checkout: Path) -> None:
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in f'{f}{type(f)}'.lower()]\n"
    found = python(f"{code}{IMPORTS}; print(fastres.__file__)", checkout)
    assert Path(found.strip()) == checkout / "fastres" / "__init__.py"


def test_no_module_is_imported_twice() -> None:
    """From the checkout's root, a module with its short name is the same module as with its long name."""
    code = (
        "import bench.study.report, bench.run, export.onnx, fastres.bench.study.report, fastres.bench.run, sys\n"
        "from bench.measure import timing\n"
        "import fastres.export.onnx, fastres.bench.measure.timing\n"
        "assert bench is fastres.bench and export is fastres.export\n"
        "assert bench.run is fastres.bench.run and timing is fastres.bench.measure.timing\n"
        "assert bench.study.report is fastres.bench.study.report and export.onnx is fastres.export.onnx\n"
        "assert bench.run.__spec__.name == bench.run.__name__ == 'fastres.bench.run'\n"
        "files = [m.__file__ for m in set(sys.modules.values()) if (getattr(m, '__file__', 0) or '').endswith('.py')]\n"
        "assert len(files) == len(set(files)) > 100, [f for f in files if files.count(f) > 1]\n"
        "import bench.nothing\n"
    )
    with pytest.raises(AssertionError, match=r"No module named 'bench\.nothing'"):
        python(code, ROOT)


def test_python_m_runs_a_module_once() -> None:
    code = (
        "import runpy, sys; sys.argv = ['run', '--help']\n"
        "try: runpy.run_module('bench.run', run_name='__main__', alter_sys=True)\n"
        "except SystemExit: pass\n"
        "assert 'fastres.bench.measure.comparison' in sys.modules\n"
        "assert 'fastres.bench.run' not in sys.modules and 'bench.run' not in sys.modules\n"
        "assert sys.modules['bench'] is sys.modules['fastres.bench']\n"
    )
    assert "usage: python -m bench.run" in python(code, ROOT)


def test_the_name_kernels_is_left_to_others(tmp_path: Path) -> None:
    """transformers looks for Hugging Face's ``kernels``. From the checkout's root it finds that package, or none."""
    absent = "import kernels, importlib.util; assert not hasattr(kernels, '__file__')\nimport kernels.conv"
    with pytest.raises(AssertionError, match=r"No module named 'kernels\.conv'"):
        python(absent, ROOT)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from .layer import answer\n")
    (tmp_path / "kernels" / "layer.py").write_text("answer = 42\n")
    code = "import kernels, sys; assert 'fastres' not in sys.modules\nprint(kernels.answer)"
    assert python(code, ROOT, PYTHONPATH=str(tmp_path)).strip() == "42"
    assert python("import transformers; print(transformers.AutoModel.__name__)", ROOT).strip() == "AutoModel"


@pytest.mark.parametrize("name", PACKAGES)
def test_the_links_lead_to_the_folders(name: str) -> None:
    link = ROOT / "fastres" / name
    assert os.readlink(link) == f"../{name}", "a relative link, so that it works wherever the checkout is"
    assert (ROOT / name / "__init__.py").samefile(link / "__init__.py")
