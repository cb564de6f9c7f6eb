"""Run a page's blocks from top to bottom, as a reader would, in the current folder: ``python run_page.py PAGE``.

Python blocks share one namespace. A ``bash`` block is one script that stops at the first error. ``console`` and
``pycon`` blocks show the output below each command, and the command must print exactly that (``...`` matches any text).
Each block is printed when it runs. The run ends at the first block that fails. A page that starts a server writes
``--port 8000`` and ``127.0.0.1:8000``; the variable FASTRES_PAGE_PORT has the port that is used in its place. Last, the
code in the tables of equivalents runs (``equivalents.py``).
"""

from __future__ import annotations

import doctest
import os
import re
import socket
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).parents[2])
sys.path.insert(0, ROOT)

from tests.docs.blocks import CONSOLE, PYTHON, SESSION, SHELL, Block, blocks, page_name  # noqa: E402
from tests.docs.equivalents import equivalents, run  # noqa: E402

sys.path.remove(ROOT)  # import the fastres of the environment

PORT_VARIABLE = "FASTRES_PAGE_PORT"
EXACTNESS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class BlockFailure(Exception):
    """A block did not do what the page says."""


def run_python(block: Block, names: dict[str, Any], page: Path) -> None:
    code = "\n" * (block.line - 1) + block.code  # so that a traceback shows the line in the page
    exec(compile(code, str(page), "exec"), names)


def run_session(block: Block, names: dict[str, Any], page: Path) -> None:
    example = doctest.DocTestParser().get_doctest(block.code, names, page.name, str(page), block.line - 1)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=EXACTNESS)
    if runner.run(example, out=said.append, clear_globs=False).failed:
        raise BlockFailure("".join(said))
    names.update(example.globs)


def run_shell(script: str) -> str:
    if "pip install" in script:
        raise BlockFailure("this would change the environment; mark the block <!-- not run: installs packages -->")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise BlockFailure(f"exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def run_console(block: Block) -> None:
    for command, expected in console_commands(block.code):
        done = subprocess.run(["bash", "-c", command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if expected and not doctest.OutputChecker().check_output(expected, done.stdout, EXACTNESS):
            raise BlockFailure(f"$ {command}\nprinted\n{done.stdout}\nwhere the page shows\n{expected}")
        if not expected and done.returncode:
            raise BlockFailure(f"$ {command}\nexit status {done.returncode}\n{done.stdout}")


def console_commands(code: str) -> list[tuple[str, str]]:
    """Return the ``$ command`` lines, each with the output that the block shows below it (``""`` for none)."""
    pieces = re.split(r"^\$ ", code, flags=re.MULTILINE)
    if pieces[0].strip():
        raise BlockFailure(f"a console block begins with '$ command', this one with {pieces[0].splitlines()[0]!r}")
    commands = []
    for piece in pieces[1:]:
        command, _, output = piece.partition("\n")
        while command.endswith("\\"):
            more, _, output = output.partition("\n")
            command = f"{command}\n{more}"
        commands.append((command, output if output.strip() else ""))
    return commands


def free_port() -> int:
    """Return a port of this machine that no program uses now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def with_port(block: Block) -> Block:
    """Return ``block`` with the port that is free on this machine."""
    port = os.environ.get(PORT_VARIABLE, "8000")
    return replace(block, code=re.sub(r"(--port |127\.0\.0\.1:)8000\b", rf"\g<1>{port}", block.code))


def run_page(page: Path) -> None:
    names: dict[str, Any] = {"__name__": "__page__"}
    for block in map(with_port, blocks(page)):
        if not block.runs:
            continue
        print(f"--- {page_name(page)}:{block.line} {block.language}", flush=True)
        if block.language == PYTHON:
            run_python(block, names, page)
        elif block.language == SESSION:
            run_session(block, names, page)
        elif block.language == SHELL:
            print(run_shell(block.code), flush=True)
        elif block.language == CONSOLE:
            run_console(block)
    for row in equivalents(page):
        print(f"--- {page_name(page)}:{row.line} {row.purpose}", flush=True)
        run(row, names, page_name(page))


def main() -> int:
    page = Path(sys.argv[1]).resolve()
    if "torchvision" in page.read_text(encoding="utf-8"):
        sys.path.append(ROOT)
        import tests.conftest  # noqa: F401 - lets torchvision import beside a CPU build of torch

        sys.path.remove(ROOT)
    try:
        run_page(page)
    except BlockFailure as failure:
        print(failure, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    sys.exit(main())
