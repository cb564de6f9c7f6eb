"""Convert docstrings for mkdocstrings: fence ``>>>`` examples, turn roles such as ``:func:`` into links."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?:^[ \t]*>>> .*\n?(?:^[ \t]*(?!>>>)\S.*\n?)*)+", re.MULTILINE)
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")
_DOUBLE_TICKS = re.compile(r"(?<!`)``(?!`)")


def as_markdown(docstring: str) -> str:
    """Return ``docstring`` with its examples in fences and its roles as links to the pages of the site."""
    fenced = _EXAMPLE.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", docstring)
    linked = _ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', fenced)
    return _DOUBLE_TICKS.sub("`", linked)


class Docstrings(griffe.Extension):
    """Rewrite each docstring when it is collected."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
