"""The orchestration of ``make gpu``, tried with small commands in place of the real pieces."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastres.bench import gpu


def piece(name: str, code: str, limit: int = 60) -> gpu.Piece:
    return gpu.Piece(name, (sys.executable, "-c", code), limit)


@pytest.fixture
def visit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Pretend that there is a GPU, and run three small pieces: one fails until a file exists."""
    flag = tmp_path / "flag"
    small = [
        piece("good", "print('3 passed')"),
        piece("flaky", f"import pathlib, sys; sys.exit(not pathlib.Path({str(flag)!r}).exists())"),
        gpu.Piece("tool", ("no-such-tool-at-all",), 60, "no-such-tool-at-all"),
    ]
    monkeypatch.setattr(gpu, "pieces", lambda out: small)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "environment", dict)
    return flag


def test_resumes_where_it_stopped(visit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert gpu.main(["--out", str(out)]) == 1
    first = gpu.read_state(out)
    assert {name: outcome.status for name, outcome in first.items()} == {
        "good": "passed", "flaky": "failed", "tool": "absent",
    }  # fmt: skip
    table = capsys.readouterr().out
    assert "3 passed" in table
    assert "no-such-tool-at-all is not installed" in table
    visit.touch()
    assert gpu.main(["--out", str(out)]) == 0
    assert "[1/3]" not in capsys.readouterr().out, "what passed is not run again"
    assert gpu.read_state(out)["flaky"].status == "passed"
    assert (out / "good.log").read_text().strip() == "3 passed"


def test_changed_code_is_run_again(
    visit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    visit.touch()
    assert gpu.main(["--out", str(out)]) == 0
    monkeypatch.setattr(gpu, "code_digest", lambda: "another")
    assert gpu.main(["--out", str(out), "--only", "flaky"]) == 0
    assert gpu.main(["--out", str(out)]) == 0
    assert "[1/3] good" in capsys.readouterr().out


def test_a_budget_stops_and_copies(visit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    visit.touch()
    assert gpu.main(["--out", str(out), "--budget", "1"]) == 1
    assert gpu.read_state(out) == {}
    assert "not run" in capsys.readouterr().out
    assert gpu.main(["--out", str(out), "--budget", "500", "--copy", str(copy)]) == 0
    assert "at most 60 s" in capsys.readouterr().out
    assert gpu.read_state(copy) == gpu.read_state(out)
    assert (copy / "good.log").read_text().strip() == "3 passed"


def test_a_family_of_kernels_that_fails_is_left_out_of_the_rest(
    visit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say = "import os; print(os.environ.get('FASTRES_WITHOUT'))"
    fine = gpu.Piece("trial of gemm", (sys.executable, "-c", say), 60, trial_of="gemm")
    hangs = gpu.Piece("trial of fused", (sys.executable, "-c", f"{say}; open('/dev/stdin').fail"), 60, trial_of="fused")
    monkeypatch.setattr(gpu, "pieces", lambda out: [fine, hangs, piece("rest", say)])
    out = tmp_path / "out"
    assert gpu.main(["--out", str(out)]) == 1
    logs = [(out / f"{name}.log").read_text().split("\n")[0] for name in ("trial_of_gemm", "trial_of_fused", "rest")]
    assert logs == ["None", "None", "fused"]
    assert gpu.read_state(out)["rest"].status == "passed"


def test_every_family_of_kernels_has_a_trial(tmp_path: Path) -> None:
    found = [piece for piece in gpu.pieces(tmp_path) if piece.trial_of]
    assert {piece.trial_of for piece in found} == {"gemm", "conv_tma", "conv_specialized", "fused"}
    assert all((gpu.ROOT / piece.command[-1]).is_file() for piece in found)


def test_time_limit(tmp_path: Path) -> None:
    outcome = gpu.run_piece(piece("slow", "import time; print('begun', flush=True); time.sleep(60)", 3), tmp_path, "x")
    assert outcome.status == "out of time"
    assert outcome.note == "begun"
    assert outcome.seconds < 30


def test_pieces_name_files_that_exist(tmp_path: Path) -> None:
    found = gpu.pieces(tmp_path)
    assert len({item.name for item in found}) == len(found)
    assert all(item.limit < 600 for item in found)
    for item in found:
        for word in item.command:
            if word.startswith(("tests/", "bench/")):
                assert (gpu.ROOT / word).exists(), word


def test_every_promised_point_is_measured_and_reported(tmp_path: Path) -> None:
    points, folders = set(), []
    for item in gpu.pieces(tmp_path):
        if "fastres.bench.run" in item.command:
            given = dict(zip(item.command, item.command[1:], strict=False))
            model, dtype, folder = given["--model"], given["--dtype"], Path(given["--out"])
            points |= {(model, dtype, int(batch)) for batch in given["--batch"].split(",")}
            folders.append(folder)
            assert folder.parent == tmp_path  # where the report looks for runs
    assert len(folders) == len(set(folders))
    models = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2"]
    for model in models:
        assert {batch for name, dtype, batch in points if (name, dtype) == (model, "float16")} == {
            1, 8, 32, 64, 128, 256, 512,
        }  # fmt: skip
    names = [item.name for item in gpu.pieces(tmp_path)]
    assert names.index("report") > max(index for index, name in enumerate(names) if "batch" in name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_says_when_there_is_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_piece_names_files_that_exist(tmp_path: Path) -> None:
    named = {
        word for piece in gpu.pieces(tmp_path) for word in piece.command if word.endswith(".py") or "tests/" in word
    }
    assert {"tests/kernels", "tests/gpu", "tests/test_gpu_executor.py"} <= named
    assert all((gpu.ROOT / word).exists() for word in named), named
    marked = {path.relative_to(gpu.ROOT).as_posix() for path in (gpu.ROOT / "tests" / "bench").glob("test_*.py")
              if "mark.gpu" in path.read_text() and path.name != Path(__file__).name}  # fmt: skip
    assert marked <= named, "every GPU test is part of a piece"
