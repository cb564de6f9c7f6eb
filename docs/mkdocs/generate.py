"""Write the generated parts of the pages, and the facts of ``fastres list``: ``python docs/mkdocs/generate.py``.

A test checks that they are current.
"""

from __future__ import annotations

import re
from pathlib import Path

import cards
import drawings
import front
import migrate
import models_data
import quantisation
import results

DOCS = Path(__file__).parents[1]


def with_section(text: str, name: str, content: str) -> str:
    """Return ``text`` with the part between ``<!-- name: begin -->`` and ``<!-- name: end -->`` replaced."""
    pattern = re.compile(rf"(<!-- {name}: begin[^>]*-->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    replaced, count = pattern.subn(lambda match: f"{match[1]}\n{content}\n{match[2]}", text)
    assert count == 1, f"{name} must occur once, and occurs {count} times"
    return replaced


def generated() -> dict[Path, str]:
    """Return the path and the content of every generated file."""
    sections = {
        "../README.md": {"front": front.section("docs/", ""), "table": front.table()},
        "index.md": {"front": front.section("", "../")},
        "models.md": {"cards": cards.cards(), "without weights": cards.without_weights()},
        "quantize.md": {"measured": quantisation.measured(), "speed": quantisation.speed()},
        "results.md": {"results": results.measured()},
        **{f"migrate/{page}": {"speed": migrate.speed(engine)} for page, engine in migrate.ENGINES.items()},
    }
    files = {}
    for page, contents in sections.items():
        path = (DOCS / page).resolve()
        text = path.read_text(encoding="utf-8")
        for name, content in contents.items():
            text = with_section(text, name, content)
        files[path] = text
    for name, draw in {**drawings.DRAWINGS, front.NAME: front.front}.items():
        files[DOCS / "images" / name] = draw()
    files[DOCS.parent / "fastres" / "data" / "models.json"] = models_data.text()
    return files


if __name__ == "__main__":
    for path, content in generated().items():
        path.write_text(content, encoding="utf-8")
        print(path)
