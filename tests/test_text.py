"""Names of files as text: every name can be written, and no two are written alike."""

from __future__ import annotations

import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastres.text import path_of_text, path_text, text_table

NAMES = st.lists(
    st.sampled_from([b"\\", b"\\\\", b"x", b"e9", b"\xe9", b"\\xe9", b"/", "é".encode(), b"\xc3", b".jpg"]), max_size=8
).map(b"".join)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"a.jpg", "a.jpg"),
        ("ünï ☃.jpg".encode(), "ünï ☃.jpg"),
        (b"a\\b.jpg", "a\\b.jpg"),
        (b"a\xe9.jpg", "a\\xe9.jpg"),
        (b"a\\xe9.jpg", "a\\\\xe9.jpg"),
        (b"\\\xe9", "\\\\\\xe9"),
    ],
)
def test_text(name: bytes, text: str) -> None:
    assert path_text(name) == path_text(os.fsdecode(name)) == text


@settings(max_examples=2000, derandomize=True, deadline=None)
@given(NAMES, NAMES)
@example(b"\\\\xe9", b"\\\xe9")
def test_two_names_are_never_written_alike(one: bytes, other: bytes) -> None:
    assert (path_text(one) == path_text(other)) == (one == other)
    path_text(one).encode()
    assert os.fsencode(path_of_text(path_text(one))) == one


def test_a_table_that_is_too_wide_becomes_several() -> None:
    rows = [("name", "one", "two", "three"), ("a", "1", "22", "333"), ("bb", "4", "5", "6")]
    assert text_table(rows, right=(1, 2, 3)) == text_table(rows, right=(1, 2, 3), width=22)
    narrow = text_table(rows, right=(1, 2, 3), width=14)
    assert narrow == "name  one  two\na       1   22\nbb      4    5\n\nname  three\na       333\nbb        6"
    assert max(map(len, narrow.splitlines())) <= 14
    assert len(text_table(rows, width=1).split("\n\n")) == 3  # a column is never cut
