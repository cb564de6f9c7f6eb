"""Huge pages: asked for by programs, one call for others, and no silent failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastres import memory

needs_huge_pages = pytest.mark.skipif(not memory.offered(), reason="this system has no transparent huge pages")
decided = memory._setting() == "always"


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != memory.VARIABLE}
    return subprocess.run(
        [sys.executable, "-c", code], env={**environment, **variables}, capture_output=True, text=True, check=False
    )


@needs_huge_pages
def test_the_call_works_before_the_first_tensor() -> None:
    done = python("import fastres; print(fastres.use_huge_pages(), fastres.memory.in_use())")
    assert done.stdout.split() == ["True", "True"], done.stderr


@needs_huge_pages
@pytest.mark.skipif(decided, reason="every program has huge pages here")
def test_a_call_that_comes_too_late_says_so() -> None:
    done = python("import fastres, torch; torch.zeros(3); fastres.use_huge_pages()")
    assert "DeviceError: torch has created a tensor already" in done.stderr
    late = python("import fastres, torch; torch.zeros(3); print(fastres.use_huge_pages())", **{memory.VARIABLE: "1"})
    assert late.stdout.split() == ["True"], "it was set in the environment"


@needs_huge_pages
@pytest.mark.parametrize("given", [None, "0"])
def test_programs_ask_for_them_unless_the_user_decides(given: str | None) -> None:
    code = (
        "import sys; from fastres.commands.cli import main; sys.argv = ['fastres', 'env', '--json']; sys.exit(main())"
    )
    done = python(code, **({} if given is None else {memory.VARIABLE: given}))
    assert json.loads(done.stdout)["huge_pages"] is (decided or given is None), done.stderr


@needs_huge_pages
@pytest.mark.skipif(decided, reason="every program has huge pages here")
def test_libraries_do_not_ask() -> None:
    code = "import fastres, torch; fastres.load('resnet20_digits'); print(fastres.memory.in_use())"
    assert python(code).stdout.split() == ["False"]


@pytest.mark.parametrize(
    ("text", "expected"), [("always madvise [never]\n", False), (None, False), ("[always] never", True)]
)
def test_systems_without_them(
    text: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "enabled"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(memory, "_SETTING", path)
    monkeypatch.delenv(memory.VARIABLE, raising=False)
    assert (memory.offered(), memory.in_use(), memory.use_huge_pages()) == (expected,) * 3
    monkeypatch.delenv(memory.VARIABLE, raising=False)
    memory.ask_for_huge_pages()
    assert (memory.VARIABLE in os.environ) is expected
