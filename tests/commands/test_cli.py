"""The command line, called as a person and as a program would call it."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image

import fastres
from fastres.bench.digits.data import as_image, load_scans
from fastres.commands.cli import main
from fastres.errors import ResumeWarning
from fastres.program import run_program
from fastres.terminal import warn


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["model", "params"]
    (row,) = (line for line in lines if line.startswith("resnet50 "))
    assert "25.6M" in row
    assert "IMAGENET1K_V2 80.9" in row
    assert max(map(len, lines)) <= 80


def test_without_a_command_and_with_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "classify images" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["clasify", "photos"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "there is no command 'clasify'. Did you mean 'classify'" in said
    with pytest.raises(SystemExit):
        main(["--version"])


def test_list_some(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "resnet5*", "wide*", "--pretrained"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names == ["resnet50", "wide_resnet50_2", "wide_resnet101_2"]
    assert main(["list", "vgg*"]) == 2
    assert "No model matches vgg*. 'fastres list' lists all." in capsys.readouterr().err


def test_the_commands_that_show_facts_do_not_import_torch() -> None:
    for arguments in (["--version"], ["--help"], ["list"], ["list", "--json"], ["predict", "--help"]):
        code = f"from fastres.commands.cli import main\ntry: main({arguments!r})\nexcept SystemExit: pass\nimport sys\n"
        code += "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(fastres.list_models())
    assert rows["resnet18"]["parameters"] == 11_689_512
    assert rows["resnet50"]["weights"]["IMAGENET1K_V2"]["default"]


@pytest.fixture
def digits(tmp_path: Path) -> list[Path]:
    scans, _ = load_scans()
    paths = [tmp_path / f"digit{index}.png" for index in range(3)]
    for path, scan in zip(paths, scans, strict=False):
        as_image(scan).save(path)
    return paths


def test_predict(digits: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", *map(str, digits), "--model", "resnet20_digits", "--top-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(digits[0])
    assert lines[1].split()[1] == "0"
    assert lines[1].split()[0].endswith("%")
    assert len(lines) == 9


def test_predict_as_json(digits: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", *map(str, digits), "--model", "resnet20_digits", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["predictions"][0]["label"] for row in rows] == ["0", "1", "2"]
    assert all(row["predictions"][0]["score"] > 0.5 for row in rows)


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fastres"] == fastres.__version__
    assert facts["torch"]
    assert "float32" in facts["cpu_dtypes"]
    assert main(["env"]) == 0
    assert "weights_folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "x.jpg", "--model", "resnet5o"], "Did you mean"),
        (["predict", "x.jpg", "--model", "resnet20_digits", "--device", "cuda:99"], "cannot be moved"),
        (["predict", "x.jpg", "--model", "resnet20_digits", "--dtype", "int8"], "int8"),
        (["predict", "x.jpg", "--model", "resnet20"], "no published weights"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastres: ")
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_export_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "digits.onnx"
    assert main(["export", "resnet20_digits", str(path), "--quiet"]) == 0
    assert path.is_file()
    capsys.readouterr()
    assert main(["export", "--inspect", str(path), "--json"]) == 0
    assert "resnet20_digits" in capsys.readouterr().out
    assert main(["export", "resnet20_digits", str(tmp_path / "missing" / "x.onnx"), "--quiet"]) == 2
    assert "missing" in capsys.readouterr().err


def test_module_and_version() -> None:
    result = subprocess.run([sys.executable, "-m", "fastres", "--version"], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == f"fastres {fastres.__version__}"


def test_unreadable_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cut.jpg"
    Image.new("RGB", (64, 64), (200, 10, 90)).save(path)
    path.write_bytes(path.read_bytes()[:200])
    assert main(["predict", str(path), "--model", "resnet20_digits"]) == 1
    assert "cut.jpg" in capsys.readouterr().err


def test_warnings_are_messages(capsys: pytest.CaptureFixture[str]) -> None:
    def warned() -> None:
        warn("one line", ResumeWarning)
        warnings.warn_explicit("of another library", UserWarning, "other.py", 5)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *given: print(warnings.formatwarning(*given[:4]), file=sys.stderr, end="")
        usual = warnings.formatwarning
        assert run_program(warned, "fastres", owner=False) == 0
    assert capsys.readouterr().err == "fastres: warning: one line\nother.py:5: UserWarning: of another library\n"
    assert warnings.formatwarning is usual
