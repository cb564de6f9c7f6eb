"""Memory that is kept: by fastres's own programs, by one call in others, never behind their back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastres import memory

VARIABLES = (memory.VARIABLE, *memory.CHOSEN)
HUGE = memory._setting() == "madvise"
needs_huge_pages = pytest.mark.skipif(not HUGE, reason="programs cannot choose huge pages here")

# Prints how many bytes more the process has mapped after it has freed 64 MB than before.
FREED = """
import torch
def mapped():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
torch.zeros(3)
before = mapped()
block = torch.ones(64 << 20, dtype=torch.uint8)
del block
print(mapped() - before)
"""


def python(code: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, "-c", code], env={**environment, **variables}, capture_output=True, text=True, check=True
    ).stdout


def environment_of_program(**variables: str) -> dict[str, object]:
    code = "import sys; from fastres.commands.cli import main; sys.argv[1:] = ['env', '--json']; sys.exit(main())"
    facts: dict[str, object] = json.loads(python(code, **variables))
    return facts


def test_memory_is_kept_after_the_call() -> None:
    assert int(python(FREED)) < 32 << 20
    assert int(python(f"import fastres; assert fastres.keep_memory(); {FREED}".replace("; \n", "\n"))) > 48 << 20


def test_it_can_be_taken_back() -> None:
    start = "from fastres import memory; memory.keep_memory(); memory.keep_little(); assert not memory.is_kept()"
    assert int(python(f"{start}\n{FREED}")) < 32 << 20


def test_programs_keep_memory_unless_the_user_decides() -> None:
    facts = environment_of_program()
    assert facts["memory_kept"] is True
    assert environment_of_program(MALLOC_TRIM_THRESHOLD_="100000")["memory_kept"] is False


@needs_huge_pages
def test_programs_have_huge_pages_unless_the_user_decides() -> None:
    assert environment_of_program()["huge_pages"] is True
    assert environment_of_program(**{memory.VARIABLE: "0"})["huge_pages"] is False


def test_libraries_do_not() -> None:
    code = "import fastres; from fastres import memory; fastres.load('resnet20_digits'); print(memory.is_kept())"
    assert python(code).split() == ["False"]


@needs_huge_pages
def test_huge_pages_are_decided_by_the_first_tensor() -> None:
    end = "fastres.keep_memory(); print(fastres.memory.has_huge_pages())"
    assert python(f"import fastres; {end}").split() == ["True"]
    assert python(f"import fastres, torch; torch.zeros(3); {end}").split() == ["False"]


@pytest.mark.parametrize(
    ("text", "expected"), [("always madvise [never]\n", False), (None, False), ("[always] madvise never", True)]
)
def test_systems_where_programs_cannot_choose(
    text: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "enabled"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(memory, "_SETTING", path)
    monkeypatch.delenv(memory.VARIABLE, raising=False)
    monkeypatch.setattr(memory, "_mallopt", lambda values: False)
    assert memory.keep_memory() is False, "another C library"
    assert memory.VARIABLE not in os.environ
    assert memory.has_huge_pages() is expected
