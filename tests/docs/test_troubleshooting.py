"""Every message that the troubleshooting page quotes is one that the code can print."""

from __future__ import annotations

import ast
import functools
import inspect
import re

import pytest

import fastres.errors

from .blocks import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = ("fastres", "kernels", "export", "bench")
FOREIGN = "operator torchvision::nms does not exist"  # torchvision's own message, which users look up here


def quoted() -> list[str]:
    """Return the messages in the headings."""
    return re.findall(r"^### `(.+?)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def as_shown(node: ast.expr) -> str:
    """Return a string as the page writes it, with ``…`` for inserted values."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    assert isinstance(node, ast.JoinedStr)
    whole = "".join(as_shown(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return re.sub("…+", "…", whole)


@functools.cache
def messages() -> str:
    """Return all strings of the code, one per line."""
    found = []
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            inside: set[int] = set()  # the pieces of an f-string are not separate strings
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    inside |= {id(part) for part in node.values}
                if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in inside:
                    found.append(as_shown(node).replace("\n", " "))
    return "\n".join(found)


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_one_of_the_codes(message: str) -> None:
    assert message.strip("… .") in messages() or message == FOREIGN


def test_a_message_that_is_not_there_would_be_found_out() -> None:
    assert "No model is called …" in messages()
    assert "No model is named …" not in messages()


def test_every_error_class_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for module in (fastres.errors, __import__("fastres.export.errors", fromlist=["errors"])):
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, fastres.errors.FastresError):
                assert f"`{name}`" in text or f"`fastres.{name}`" in text, name


def test_headings_are_unique() -> None:
    assert len(set(quoted())) == len(quoted())
