"""Find the code blocks of a page, and those that tests do not run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md")

PYTHON, SESSION, SHELL, CONSOLE = "python", "pycon", "bash", "console"
RUN = (PYTHON, SESSION, SHELL, CONSOLE)
SHOWN = ("text", "json", "toml", "yaml")  # the content of a file or the output of a program

# Reasons why no test runs a block. A page gives one on the line before the block: <!-- not run: needs a GPU -->
NEEDS_GPU = "needs a GPU"  # run if there is one
REASONS = (
    NEEDS_GPU,
    "needs a network",
    "needs a cluster",
    "needs Slurm",
    "needs Kubernetes",
    "needs Docker",
    "needs systemd",
    "needs ray[serve]",
    "needs labelled images",
    "installs packages",
    "takes minutes",
    "runs until it is stopped",
)

_FENCE = re.compile(
    r"^(?:[ \t]*<!-- not run: (?P<reason>.*?) -->\n\n?)?"
    r"(?P<indent>[ \t]*)```(?P<language>\S*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ \t]*$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block. ``line`` is the first line of its code in the page. ``reason`` says why it is not run, if so."""

    line: int
    language: str
    code: str
    reason: str | None

    @property
    def runs(self) -> bool:
        if self.language not in RUN or self.reason is None:
            return self.language in RUN
        if self.reason != NEEDS_GPU:
            return False
        import torch

        return torch.cuda.is_available()


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Return all fenced blocks of ``page``, in order, without their indentation."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        indent = match["indent"]
        code = "".join(line.removeprefix(indent) for line in match["code"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start("code")) + 1
        language = "bash" if match["language"] == "sh" else match["language"]
        found.append(Block(line, language, code, match["reason"]))
    return found
