"""``fastres completion``: the code for each shell, and what it completes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastres.commands.cli import main


def completed(line: str, tmp_path: Path) -> list[str]:
    """Return the completions of ``line``, asked as a shell asks."""
    answers = tmp_path / "answers"
    answers.touch()
    variables = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answers),
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    code = "from fastres.commands.cli import main; import sys; sys.argv = ['fastres']; main()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, cwd=tmp_path, check=True)
    return [word.rstrip() for word in answers.read_text().split("\v")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_code_for_a_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    code = capsys.readouterr().out
    assert "fastres" in code
    assert "_ARGCOMPLETE" in code


def test_words(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").touch()
    assert completed("fastres pre", tmp_path) == ["predict"]
    assert {"--allow-urls", "--csv"} < set(completed("fastres predict --", tmp_path))
    assert set(completed("fastres predict --model resnet5", tmp_path)) == {"resnet50", "resnet50d", "resnet56"}
    assert completed("fastres predict c", tmp_path) == ["cat.jpg"]
    assert set(completed("fastres list wide", tmp_path)) == {"wide_resnet50_2", "wide_resnet101_2"}


def test_an_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["completion", "cmd"])
    assert "choose from" in capsys.readouterr().err
