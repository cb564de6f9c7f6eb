"""The cache of recent values: which values it keeps, in which order, and concurrent creation."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastres.executors.recent import Recent


def never() -> int:
    raise AssertionError("what is kept is not made again")


@given(st.lists(st.integers(0, 6), max_size=60), st.integers(1, 5))
def test_makes_what_an_lru_cache_makes(keys: list[int], kept: int) -> None:
    ours: list[int] = []
    theirs: list[int] = []
    recent = Recent[int, int](kept)

    def maker(key: int) -> Callable[[], int]:
        return lambda: ours.append(key) or -key  # type: ignore[func-returns-value]

    @functools.lru_cache(maxsize=kept)
    def cached(key: int) -> int:
        theirs.append(key)
        return -key

    for key in keys:
        assert recent.get_or_make(key, maker(key)) == cached(key) == -key
        assert len(recent) <= kept
    assert ours == theirs


def test_order_is_that_of_the_last_use() -> None:
    recent = Recent[str, int](3)
    for key in "abc":
        assert recent.keep(key, ord(key)) == ord(key)
    recent.get_or_make("a", never)
    recent.keep("b", 0)
    assert list(recent.items()) == [("c", ord("c")), ("a", ord("a")), ("b", 0)]
    recent.keep("d", 1)
    assert list(recent) == ["a", "b", "d"]


def test_none_is_a_value() -> None:
    recent = Recent[str, int | None](2)
    recent.keep("a", None)
    assert recent.get_or_make("a", never) is None
    assert dict(recent) == {"a": None}


def test_nothing_is_forgotten_while_a_value_is_made() -> None:
    recent = Recent[int, list[int]](2)
    for size in range(2):
        recent.keep(size, [size])
    assert recent.get_or_make(2, lambda: [key for value in recent.values() for key in value]) == [0, 1]
    assert list(recent) == [1, 2]


def test_what_cannot_be_made_leaves_everything_as_it_was() -> None:
    recent = Recent[int, float](2)
    for key in (1, 2):
        recent.keep(key, key)
    with pytest.raises(ZeroDivisionError):
        recent.get_or_make(0, lambda: 1 / 0)
    assert list(recent) == [1, 2]
