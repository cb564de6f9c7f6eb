"""Write what pages have of the code's own data: ``python docs/mkdocs/generate.py``. A test checks that it was run."""

from __future__ import annotations

import re
from pathlib import Path

import cards
import drawings

DOCS = Path(__file__).parents[1]


def with_section(text: str, name: str, content: str) -> str:
    """``text`` with what stands between ``<!-- name: begin -->`` and ``<!-- name: end -->`` replaced."""
    pattern = re.compile(rf"(<!-- {name}: begin[^>]*-->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    replaced, count = pattern.subn(lambda match: f"{match[1]}\n{content}\n{match[2]}", text)
    assert count == 1, f"{name} has no place, or several"
    return replaced


def generated() -> dict[Path, str]:
    """Path → content of every file that is made of the code's data."""
    models = DOCS / "models.md"
    text = with_section(models.read_text(encoding="utf-8"), "cards", cards.cards())
    text = with_section(text, "without weights", cards.without_weights())
    files = {models: text}
    for name, draw in drawings.DRAWINGS.items():
        files[DOCS / "images" / name] = draw()
    return files


if __name__ == "__main__":
    for path, content in generated().items():
        path.write_text(content, encoding="utf-8")
        print(path)
