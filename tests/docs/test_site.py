"""The site builds without warnings, every link, anchor and image exists, and nothing loads from other servers."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

from fastres.version import __version__

from .blocks import ROOT

pytest.importorskip("mkdocstrings")

CONFIG = ROOT / "docs" / "mkdocs" / "mkdocs.yml"
PAGES = sorted(path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md"))


class Reader(HTMLParser):
    """Collects the links, loaded files and anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.headings = 0
        self.description = ""
        self.pictures: list[dict[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in ("img", "script", "source", "iframe") and "src" in values:
            self.loads.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.append(values["href"])
        if tag == "meta" and values.get("name") == "description":
            self.description = values["content"]
        if tag == "img" and "logo" not in values["src"]:
            self.pictures.append(values)
        self.headings += tag == "h1"


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", CONFIG, "-d", folder]
    done = subprocess.run(command, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_docstrings_become_markdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(CONFIG.parent)
    from docstrings import as_markdown

    assert as_markdown("Gives ``x``.\n\n>>> f(x)[0][1]\n3\n") == "Gives `x`.\n\n```pycon\n>>> f(x)[0][1]\n3\n```\n"
    assert as_markdown("See :func:`fastres.load`.").startswith('See <autoref optional identifier="fastres.load">')


def test_a_short_cell_and_an_option_stay_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(CONFIG.parent)
    from hooks import on_page_content

    page = SimpleNamespace(meta={}, title="Speed")
    cells = "<td><strong>19.6 ms</strong></td><td>three short words</td><td><code>--max-batch N</code></td>"
    assert on_page_content(cells, page, SimpleNamespace(site_name="fastres"), None) == (
        "<td><strong>19.6&nbsp;ms</strong></td><td>three short words</td>"
        '<td><code class="option">--max-batch N</code></td>'
    )
    assert page.meta["description"] == "Speed of fastres"


@pytest.mark.slow
def test_every_page_is_there(site: Path) -> None:
    for name in (*PAGES, "contributing", "changelog"):
        assert read(site / f"{name}.html").headings == 1, name


@pytest.mark.slow
def test_links_and_images_resolve(site: Path) -> None:
    pages = {path: read(path) for path in site.rglob("*.html") if "results" not in path.parts}
    for path, page in pages.items():
        if path.name == "404.html":  # served at any address, so its links are absolute
            continue
        for target in (*page.links, *page.loads):
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            found = (path.parent / unquote(url.path)).resolve() if url.path else path
            assert found.exists(), f"{path.name} links to {target}"
            if url.fragment and found in pages and not url.fragment.startswith("__"):
                assert unquote(url.fragment) in pages[found].anchors, f"{path.name} links to {target}"


@pytest.mark.slow
def test_every_page_has_a_description_of_its_own_and_the_version(site: Path) -> None:
    pages = [site / f"{name}.html" for name in (*PAGES, "contributing", "changelog")]
    descriptions = {read(page).description for page in pages}
    assert len(descriptions) == len(pages)
    assert min(map(len, descriptions)) > 15
    assert 'it is a drop-in as well: fastres.load("resnet50").cuda()' in " ".join(
        read(site / "index.html").description.split()
    )
    for page in pages:
        assert f"fastres {__version__}\n" in page.read_text(encoding="utf-8"), page.name


@pytest.mark.slow
def test_every_picture_is_described_and_leads_to_its_file(site: Path) -> None:
    pages = [read(site / f"{name}.html") for name in PAGES]
    assert sum(len(page.pictures) for page in pages) > 20
    for page in pages:
        for picture in page.pictures:
            assert len(picture["alt"]) > 15, picture
            assert picture["src"] in page.links, picture


@pytest.mark.slow
def test_search_needs_no_server(site: Path) -> None:
    """The index is a script, and the page loads the project's own stand-in for a Worker before the theme's scripts."""
    assert (site / "search" / "search_index.js").read_text(encoding="utf-8").startswith("var __index = {")
    scripts = [load for load in read(site / "index.html").loads if load.endswith(".js")]
    assert scripts[0] == "mkdocs/iframe-worker.js"
    assert len(scripts) > 1


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert not [target for target in read(path).loads if urlsplit(target).netloc], path.name


@pytest.mark.slow
def test_the_reference_has_the_public_names(site: Path) -> None:
    import fastres

    anchors = read(site / "api.html").anchors
    for name in fastres.__all__:
        assert f"fastres.{name}" in anchors or name in ("__version__", "FastresError"), name
    assert "fastres.errors.FastresError" in anchors
