"""Visits to a GPU: their pieces, and whole visits with small commands instead of the real pieces."""

from __future__ import annotations

import json
import os
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastres.bench.visit import home, running
from fastres.bench.visit import state as states
from fastres.bench.visit.pieces import Piece
from fastres.bench.visit.running import Outcome
from fastres.bench.visit.visit import RESERVE, Visit
from fastres.errors import FastresError


def piece(name: str, code: str, limit: int = 60, **more: object) -> Piece:
    return Piece(name, (sys.executable, "-c", code), 1, limit, ("fastres/text.py",), program=True, **more)  # type: ignore[arg-type]


def visit(tmp_path: Path, *todo: Piece, budget: float = 500, **more: object) -> Visit:
    made = Visit("first", "a GPU", tmp_path / "work" / "a-gpu", tmp_path / "out", budget, **more)  # type: ignore[arg-type]
    made.todo = list(todo)
    return made


# -- the pieces of visits ------------------------------------------------------------------------------------


# -- running, stopping, resuming -----------------------------------------------------------------------------


def test_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flag = tmp_path / "flag"
    todo = [
        piece("good", "print('3 passed')"),
        piece("flaky", f"import pathlib\nif not pathlib.Path({str(flag)!r}).exists(): raise ValueError('not yet')"),
        piece("tool", "", needs="no-such-tool-at-all"),
    ]
    assert visit(tmp_path, *todo).run() == 1
    table = capsys.readouterr().out
    assert "3 passed" in table
    assert "no-such-tool-at-all is not installed" in table
    assert "flaky: failed in" in table
    assert "ValueError: not yet" in table
    flag.touch()
    second = visit(tmp_path, *todo)
    assert [item.name for item in todo if second.is_due(item)] == ["flaky"], "pieces that passed are not run again"
    assert second.run() == 0
    assert "2 of its pieces are already done" in capsys.readouterr().out
    assert {name: outcome.status for name, outcome in second.state.items()} == {
        "good": "passed", "flaky": "passed", "tool": "absent",
    }  # fmt: skip


def test_a_piece_is_due_when_its_own_inputs_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = visit(tmp_path, piece("good", ""))
    assert made.run() == 0
    assert not visit(tmp_path, *made.todo).is_due(made.todo[0])
    other = replace(made.todo[0], inputs=("fastres/errors.py",))
    assert visit(tmp_path, other).is_due(other)
    assert visit(tmp_path, *made.todo, again=True).is_due(made.todo[0])


def test_a_digest_is_of_the_named_files_alone(tmp_path: Path) -> None:
    one = Piece("p", ("module",), 1, 1, ("kernels/*.py",))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "conv.py").write_text("a")
    before = running.digest(one, tmp_path)
    (tmp_path / "README.md").write_text("new")
    assert running.digest(one, tmp_path) == before
    (tmp_path / "kernels" / "conv.py").write_text("b")
    assert running.digest(one, tmp_path) != before
    assert running.digest(replace(one, without="tables"), tmp_path) != running.digest(one, tmp_path)


def test_records_of_earlier_visits_count(tmp_path: Path) -> None:
    first = visit(tmp_path / "a", piece("good", ""))
    assert first.run() == 0
    record = first.folder / states.STATE
    assert visit(tmp_path / "b", *first.todo).is_due(first.todo[0]), "a new folder has no record"
    assert not visit(tmp_path / "b", *first.todo, before=(record,)).is_due(first.todo[0])


def test_a_budget_ends_a_visit_and_names_the_remaining_pieces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = visit(tmp_path, piece("good", ""), piece("later", ""), budget=RESERVE + 1)
    assert short.run() == 1
    assert short.state == {}
    said = capsys.readouterr().out
    assert "not started: good, later" in said
    assert "not run" in said


def test_a_piece_is_stopped_with_all_its_processes(tmp_path: Path) -> None:
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {!r}]); time.sleep(60)"
    late = tmp_path / "late"
    grandchild = f"import time, pathlib; time.sleep(4); pathlib.Path({str(late)!r}).touch()"
    made = visit(tmp_path, piece("slow", f"print('begun', flush=True); {child.format(grandchild)}", limit=2))
    assert made.run() == 1
    outcome = made.state["slow"]
    assert (outcome.status, outcome.note) == ("out of time", "begun")
    assert outcome.seconds < 30
    time.sleep(4)
    assert not late.exists()


def test_grace_ends_with_the_first_word(tmp_path: Path) -> None:
    slow = "import time; time.sleep(3); print('here', flush=True)"
    todo = [
        replace(piece("loads", slow, limit=2), grace=30),
        replace(piece("hangs", f"{slow}; time.sleep(60)", limit=2), grace=30),
        replace(piece("mute", "import time; time.sleep(60)", limit=1), grace=1),
    ]
    made = visit(tmp_path, *todo)
    assert made.run() == 1
    assert {name: outcome.status for name, outcome in made.state.items()} == {
        "loads": "passed", "hangs": "out of time", "mute": "out of time",
    }  # fmt: skip
    assert made.state["hangs"].note == "here"
    assert made.state["hangs"].seconds < 30


def test_pieces_of_a_group_run_side_by_side(tmp_path: Path) -> None:
    meet = (
        "import pathlib, sys, time; here = pathlib.Path(sys.argv[1]); here.joinpath(sys.argv[2]).touch()\n"
        "end = time.monotonic() + 50\n"
        "while len(list(here.iterdir())) < 2:\n"
        "    if time.monotonic() > end: sys.exit('alone')\n"
        "    time.sleep(0.05)"
    )
    (tmp_path / "meeting").mkdir()
    todo = [
        Piece(name, (sys.executable, "-c", meet, str(tmp_path / "meeting"), name), 1, 60, ("x",), "pair", program=True)
        for name in ("one", "two")
    ]
    assert visit(tmp_path, *todo).run() == 0


def test_a_piece_that_can_resume_is_started_again(tmp_path: Path) -> None:
    count = tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x'); import os, sys; sys.exit(os.path.getsize({str(count)!r}) < 3)"
    assert visit(tmp_path, piece("tuner", code, tries=3)).run() == 0
    assert count.read_text() == "xxx"
    assert visit(tmp_path, piece("other tuner", "import sys; sys.exit(1)", tries=2)).run() == 1


def test_an_unfinished_piece_is_due_again(tmp_path: Path) -> None:
    count = tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x'); print('3 entries were not started'); import sys; sys.exit(75)"
    todo = [piece("tuner", code, tries=3), piece("bench", "", after="tuner")]
    made = visit(tmp_path, *todo)
    assert made.run() == 1
    assert count.read_text() == "x", "it is not started again at once"
    assert (made.state["tuner"].status, made.state["tuner"].error) == ("unfinished", "3 entries were not started")
    second = visit(tmp_path, *todo)
    assert [item.name for item in todo if second.is_due(item)] == ["tuner", "bench"]


def test_a_piece_is_due_when_the_piece_it_builds_on_has_run_again(tmp_path: Path) -> None:
    todo = [piece("tuner", ""), piece("bench", "", after="tuner")]
    assert visit(tmp_path, *todo).run() == 0
    time.sleep(1.1)
    assert visit(tmp_path, *todo, only=()).run() == 0
    alone = visit(tmp_path, todo[0], again=True)
    assert alone.run() == 0
    assert [item.name for item in todo if visit(tmp_path, *todo).is_due(item)] == ["bench"]


def test_a_signal_is_named(tmp_path: Path) -> None:
    made = visit(tmp_path, piece("killed", "import os; os.kill(os.getpid(), 9)"))
    assert made.run() == 1
    assert made.state["killed"].error.startswith("killed by SIGKILL")


def test_a_family_that_does_not_pass_is_left_out_of_what_follows(tmp_path: Path) -> None:
    say = "import os; print(os.environ['FASTRES_WITHOUT'])"
    todo = [
        piece("smoke gemm", say, together="smoke", family="gemm"),
        piece("smoke fused", f"{say}; raise RuntimeError('CUDA error')", together="smoke", family="fused"),
        piece("smoke conv", "raise RuntimeError('wrong')", together="smoke", family="conv"),
        piece("tuned", say),
        piece("rules", say, without="tables"),
    ]
    made = visit(tmp_path, *todo)
    assert made.run() == 1
    logs = [(made.folder / "logs" / f"{name}.log").read_text().split() for name in ("smoke-gemm", "tuned", "rules")]
    assert logs == [[], ["fused"], ["fused,tables"]], "the general convolution cannot be left out"
    assert set(made.left_out()) == {"fused", "conv"}
    assert home.exclusions(made.state)[1]["error"] == "RuntimeError: CUDA error"


def test_each_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    write = "import pathlib, sys, time; p = pathlib.Path(sys.argv[1]); p.mkdir(); p.joinpath('x').write_text('1')"
    one = Piece("bench", (sys.executable, "-c", write, "{run}"), 1, 60, ("x",), program=True)
    first = visit(tmp_path, one)
    assert first.run() == 0
    time.sleep(1.1)
    assert visit(tmp_path, one, again=True).run() == 0
    assert len(list((first.folder / "runs").iterdir())) == 2


def test_results_do_not_name_the_folders_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "work"
    root.mkdir()
    monkeypatch.setattr(running, "ROOT", root)
    given = "import os, sys; print(*sys.argv[1:], flush=True)"
    fails = f"{given}; raise ValueError(os.path.abspath(sys.argv[1]) + ' is full')"
    named = ("{run}", "{configs}", "{smoke}")
    todo = [
        Piece(name, (sys.executable, "-c", code, *named), 1, 60, ("x",), program=True)
        for name, code in (("good", given), ("bad", fails))
    ]
    for out in (root, tmp_path / "elsewhere"):
        made = visit(tmp_path, *todo, again=True)
        made.folder = out / "a-gpu"
        assert made.run() == 1
        run, configs, smoke = (made.folder / "logs" / "good.log").read_text().split()
        folder = "a-gpu" if out == root else str(made.folder)
        assert (configs, smoke) == (f"{folder}/configs", f"{folder}/smoke")
        assert run.startswith(f"{folder}/runs/")
        error = made.state["bad"].error
        assert error.startswith(f"ValueError: {folder}/runs/")
        assert error.endswith("is full")


def test_first_lines_of_errors() -> None:
    log = ["Traceback", "  File x", "ValueError: a first", "and its second line", "and a third", "and a fourth"]
    assert running.first_error(log) == "ValueError: a first\nand its second line\nand a third"
    assert running.first_error(["one", "two", "three", "four"]) == "two\nthree\nfour"


# -- the archive ---------------------------------------------------------------------------------------------


def test_an_archive_keeps_what_matters_most(tmp_path: Path) -> None:
    folder = tmp_path / "card"
    for name, size in {"runs/a/results.json": 40_000, "configs/c/conv.json": 40_000, "inductor/big": 40_000}.items():
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_bytes(os.urandom(size))
    (folder / "logs").mkdir()
    (folder / "logs" / "long.log").write_bytes(b"x" * 3 * states.LONGEST_LOG + b"the end")
    missing = states.pack(folder, tmp_path / "out" / states.ARCHIVE, largest=100_000)
    assert missing == ["card/inductor/big"]
    archive = tmp_path / "out" / states.ARCHIVE
    assert archive.stat().st_size <= 100_000
    with tarfile.open(archive) as tar:
        assert set(tar.getnames()) == {
            "card/runs/a/results.json", "card/configs/c/conv.json", "card/logs/long.log", "card/left_out.txt",
        }  # fmt: skip
        log = tar.extractfile("card/logs/long.log")
        assert log is not None
        text = log.read()
        assert len(text) == states.LONGEST_LOG
        assert text.endswith(b"the end")
        note = tar.extractfile("card/left_out.txt")
        assert note is not None
        assert note.read() == b"card/inductor/big\n"


def test_rows_without_room_are_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = states.pack
    monkeypatch.setattr(states, "pack", lambda folder, archive: pack(folder, archive, largest=1500))
    made = visit(tmp_path, piece("good", "print('x' * 10)"))
    assert made.run() == 1
    assert any("no room" in trouble for trouble in made.troubles)


@pytest.mark.parametrize("text", ["{", "[]", '{"pieces": {"a": {"status": "passed"}}}'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "work" / "a-gpu").mkdir(parents=True)
    (tmp_path / "work" / "a-gpu" / states.STATE).write_text(text)
    with pytest.raises(FastresError, match=r"visit\.json is not a readable record of a visit"):
        visit(tmp_path, piece("good", ""))


# -- the command ---------------------------------------------------------------------------------------------


def test_outcomes_survive_the_record(tmp_path: Path) -> None:
    outcome = Outcome("failed", 1.5, "é", "0123", "abc", "2026-01-01T00:00:00+00:00", "a\nb", "run")
    states.write(tmp_path / "v.json", {"p": outcome}, {"card": "x"})
    assert states.read(tmp_path / "v.json") == {"p": outcome}
    assert json.loads((tmp_path / "v.json").read_text())["card"] == "x"
    newer = replace(outcome, status="passed", date="2026-01-02T00:00:00+00:00")
    states.write(tmp_path / "w.json", {"p": newer}, {})
    assert states.read(tmp_path / "w.json", tmp_path / "v.json") == {"p": newer}
