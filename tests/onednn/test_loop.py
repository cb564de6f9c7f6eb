"""The loop in machine code does what the one in Python does."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int, c_void_p
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fastres.onednn import library, loop
from fastres.onednn.loop import Execution, loop_over

pytestmark = pytest.mark.skipif(library.absent() is not None, reason="the code is for Linux on x86_64")

LARGE = 0x7FFF_1234_5678_9ABC  # pointers need all their bits


def fake(statuses: list[int], seen: list[tuple[int | None, ...]]) -> Any:
    """Return a library whose function for an execution notes its arguments and returns the next of ``statuses``."""

    def note(*arguments: int | None) -> int:
        seen.append(arguments)
        return statuses[len(seen) - 1]

    execute = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_void_p)(note)
    address = ctypes.cast(execute, c_void_p).value
    return SimpleNamespace(execute=execute, address=lambda name: address)


@pytest.mark.parametrize("machine_code", [True, False])
@pytest.mark.parametrize(
    ("statuses", "status", "length"),
    [([], 0, 0), ([0], 0, 1), ([0] * 500, 0, 500), ([0, 0, 3, 0], 3, 3), ([1, 2], 1, 1), ([0, -1], -1, 2)],
)
def test_executions_run_until_one_fails(machine_code: bool, statuses: list[int], status: int, length: int) -> None:
    given = [Execution(LARGE + index, LARGE - index, index, 64 * index) for index in range(len(statuses))]
    seen: list[tuple[int | None, ...]] = []
    run = loop_over(fake(statuses, seen), given, machine_code)
    assert run() == status
    assert [tuple(number or 0 for number in arguments) for arguments in seen] == [tuple(row) for row in given[:length]]


def test_there_is_machine_code_here() -> None:
    assert loop.absent() is None
    assert len(loop._CODE) == 64


@pytest.fixture
def asked_again() -> object:
    loop._loop.cache_clear()
    yield
    loop._loop.cache_clear()


def denied(*_: object, **__: object) -> Callable[..., object]:
    raise PermissionError(13, "Permission denied")


@pytest.mark.usefixtures("asked_again")
def test_python_calls_each_where_the_system_allows_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.mmap, "mmap", denied)
    assert loop.absent() == "the system allows no code that is made at run time ([Errno 13] Permission denied)"
    seen: list[tuple[int | None, ...]] = []
    assert loop_over(fake([0, 7], seen), [Execution(1, 2, 3, 4), Execution(5, 6, 7, 8)])() == 7
    assert seen == [(1, 2, 3, 4), (5, 6, 7, 8)]


@pytest.mark.usefixtures("asked_again")
def test_a_page_that_must_not_run_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = SimpleNamespace(mprotect=cast(Any, lambda *arguments: -1))
    refused.mprotect.argtypes = None
    monkeypatch.setattr(loop.ctypes, "CDLL", lambda *arguments, **options: refused)
    assert "allows no code" in (loop.absent() or "")
