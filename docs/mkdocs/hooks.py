"""What the site is made of beside the pages in ``docs/``.

Pages link to the repository's files as GitHub wants them (``../CONTRIBUTING.md``). Here those links lead to pages made
of these files, or to copies of results.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
RESULTS = ("json", "csv", "png", "html", "svg")

_LINK = re.compile(r"(?<=\]\()(?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_startup(command: str, dirty: bool) -> None:
    """Copy the sources as they are laid out when installed, for mkdocstrings to read.

    At startup, because mkdocstrings passes over folders that are not there when it is configured.
    """
    package = ROOT / "build" / "api" / "fastres"
    shutil.rmtree(package, ignore_errors=True)
    not_sources = shutil.ignore_patterns("__pycache__", "data", "configs", "results")
    shutil.copytree(ROOT / "fastres", package, ignore=not_sources)
    for name in ("kernels", "export", "bench"):
        shutil.copytree(ROOT / name, package / name, ignore=not_sources)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages made of the repository's files, and the results that pages quote."""
    for source, page in PAGES.items():
        if page != "index.md":
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for path in sorted((ROOT / "bench" / "results").rglob("*")):
        if path.suffix[1:] in RESULTS:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to the repository's files into links within the site."""
    inside_docs = page.file.src_uri not in PAGES.values() or page.file.src_uri == "index.md"
    folder = "docs" if inside_docs else ""

    def within_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match["target"]))
        return PAGES.get(target, target.removeprefix("docs/")) + (match["anchor"] or "")

    return _LINK.sub(within_site, markdown)
