"""Templates that become self-contained HTML files. Their values are escaped."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import words

# What HTML does not allow, or no encoding can write: control characters, halves of surrogate pairs, noncharacters.
_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_FILTERS: Mapping[str, Callable[..., Any]] = {
    "percent": words.percent,
    "significant": words.significant,
    "error": words.error,
    "short": words.shortened,
    "digits": words.digits_for,
    "count": words.count,
}


def rendered(folder: Path, template: str, **values: Any) -> str:
    """Return the HTML text of a template in ``folder``, which may include ``style.css.jinja``.

    Characters that HTML cannot hold are written as ``\\x07``.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(_FILTERS)
    text = environment.get_template(template).render(**values)
    return _NOT_TEXT.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
