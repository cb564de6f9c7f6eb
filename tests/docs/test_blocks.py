"""Run every code block of the README and the pages as written.

The blocks of a page run from top to bottom in an empty folder, so that a reader can start at any page. Published
weights are replaced by random ones from a local server.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastres.bench.engines.compilers import torch_compile_absent

from .blocks import CONSOLE, PAGES, PYTHON, REASONS, ROOT, RUN, SESSION, SHELL, SHOWN, blocks, page_name
from .run_page import PORT_VARIABLE, BlockFailure, console_commands, free_port
from .warm import warmed
from .weights_server import link_package, publish_random_weights, served

DRIVER = Path(__file__).with_name("run_page.py")

# All blocks that are not run, so that none is added unnoticed.
NOT_RUN = {
    ("CONTRIBUTING.md", "takes minutes"): 1,
    ("README.md", "needs a GPU"): 1,
    ("README.md", "needs a network"): 1,
    ("README.md", "runs until it is stopped"): 1,
    ("docs/checkpoints.md", "needs a network"): 1,
    ("docs/classify.md", "needs a network"): 1,
    ("docs/deployment.md", "installs packages"): 1,
    ("docs/index.md", "installs packages"): 1,
    ("docs/index.md", "runs until it is stopped"): 1,
    ("docs/index.md", "needs a GPU"): 1,
    ("docs/migrate/from-torchvision.md", "needs a network"): 1,
    ("docs/releasing.md", "needs a network"): 1,
    ("docs/scaling.md", "needs Kubernetes"): 1,
    ("docs/scaling.md", "needs Slurm"): 2,  # test_scaling.py runs them
    ("docs/scaling.md", "needs a GPU"): 1,
    ("docs/scaling.md", "needs a cluster"): 1,
    ("docs/serve.md", "installs packages"): 2,
    ("docs/serve.md", "needs Docker"): 2,  # tests/serving/test_deploy.py checks these and the next two
    ("docs/serve.md", "needs systemd"): 1,
    ("docs/serve.md", "needs ray[serve]"): 2,  # and runs the application if ray[serve] is installed
    ("docs/serve.md", "needs a network"): 1,
    ("docs/serve.md", "runs until it is stopped"): 2,
    ("docs/troubleshooting.md", "needs a GPU"): 1,
}


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment variables with which a page's commands find this fastres and random weights for its models."""
    folder = tmp_path_factory.mktemp("site")
    files = tmp_path_factory.mktemp("weights")
    ray = tempfile.mkdtemp(prefix="r", dir="/tmp")  # a short path: Ray's sockets lie deep inside
    publish_random_weights(link_package(folder), files)
    scripts = os.fspath(Path(sys.executable).parent)
    with served(files) as url:
        variables = {
            **os.environ,
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.fspath(folder),
            "FASTRES_WEIGHTS_URL": url,
            "TORCH_HOME": os.fspath(folder / "torch"),
            "HOME": os.fspath(folder),
            "HF_HUB_OFFLINE": "1",
            "no_proxy": "127.0.0.1",
            "MPLBACKEND": "Agg",
            "LC_ALL": "C.UTF-8",
            "RAY_TMPDIR": ray,
            "RAY_USAGE_STATS_ENABLED": "0",
            PORT_VARIABLE: str(free_port()),
        }
        with warmed(folder, variables) as commands:
            yield {**variables, "PATH": f"{commands}{os.pathsep}{variables['PATH']}"}
    shutil.rmtree(ray)
    shutil.rmtree(files)
    shutil.rmtree(folder)


def run(page: Path, folder: Path, surroundings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a page. What it has started in the background ends with it, also if a block fails."""
    command = [sys.executable, DRIVER, page]
    with subprocess.Popen(
        command, cwd=folder, env=surroundings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as driver:  # fmt: skip
        try:
            output, _ = driver.communicate(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, driver.returncode, output)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in blocks(page))], ids=page_name)
def test_page(page: Path, surroundings: dict[str, str], tmp_path: Path) -> None:
    if shutil.which("curl") is None and any("curl " in block.code for block in blocks(page) if block.runs):
        pytest.skip("the page needs curl")
    if "compiled = torch.compile(net)\n" in page.read_text(encoding="utf-8"):
        absent = torch_compile_absent(torch.device("cpu"), torch.float32)
        if absent is not None:
            pytest.skip(absent)
    done = run(page, tmp_path, surroundings)
    assert done.returncode == 0, done.stdout
    shutil.rmtree(tmp_path)  # exported networks are large


def test_what_is_not_run_is_known_and_has_a_reason() -> None:
    found: Counter[tuple[str, str]] = Counter()
    for page in PAGES:
        fences = [line for line in page.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("```")]
        assert len(fences) == 2 * len(blocks(page)), f"{page_name(page)}: a block that the tests do not find"
        for block in blocks(page):
            place = f"{page_name(page)}:{block.line}"
            assert block.language in (*RUN, *SHOWN), f"{place}: a block of {block.language or 'no language'}"
            if block.reason is not None:
                assert block.reason in REASONS, (
                    f"{place}: {block.reason!r} is not an accepted reason; accepted: {REASONS}"
                )
                found[page_name(page), block.reason] += 1
    assert dict(found) == NOT_RUN


@pytest.mark.parametrize(
    "block",
    [
        f"```{PYTHON}\nassert 1 == 2\n```",
        f"```{SESSION}\n>>> 1 + 1\n3\n```",
        f"```{SHELL}\nfalse | cat\ntrue\n```",
        f"```{CONSOLE}\n$ echo one\ntwo\n```",
        f"```{CONSOLE}\n$ false\n```",
    ],
    ids=[PYTHON, SESSION, SHELL, "output", CONSOLE],
)
def test_a_wrong_block_fails(block: str, tmp_path: Path) -> None:
    code = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {os.fspath(ROOT)!r})
        from tests.docs import blocks, run_page
        run_page.page_name = str
        run_page.run_page(Path("page.md"))
        """
    )
    (tmp_path / "page.md").write_text(f"# Page\n\n```{PYTHON}\nx = 1\n```\n\n{block}\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "page.md:8" in done.stdout  # it got there, past a correct block


def test_console_blocks_are_commands_with_output() -> None:
    assert console_commands("$ a \\\n  b\nout\nmore\n$ c\n") == [("a \\\n  b", "out\nmore\n"), ("c", "")]
    with pytest.raises(BlockFailure, match="begins with"):
        console_commands("out\n$ a\n")
