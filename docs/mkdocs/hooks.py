"""Add files from outside ``docs/`` to the site and rewrite the links to them; describe the pages, link the pictures.

The pages link to files of the repository by paths that work on GitHub (``../CONTRIBUTING.md``). On the site these links
lead to pages made from the files, or to copies of the results.
"""

from __future__ import annotations

import posixpath
import re
import runpy
from html import escape, unescape
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
RESULTS = ("json", "csv", "png", "html", "svg")

VERSION = runpy.run_path(str(ROOT / "fastres" / "version.py"))["__version__"]

_LINK = re.compile(r"(?<=\]\()(?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?=\))")
_PARAGRAPH = re.compile(r"<p>(?!\s*<img)(.*?)</p>", re.DOTALL)
_TAG = re.compile(r"<[^>]+>")
_SHORT_CELL = re.compile(r"(<t[dh][^>]*>(?:<strong>)?[^<>\s]{1,8}) (?=[^<>\s]{1,8}(?:</strong>)?</t[dh]>)")
_OPTION = re.compile(r"<code>(?=--?[\w-]+(?: \S{1,8})?</code>)")
_PICTURE = re.compile(r'<p>\s*(<img [^>]*?src="([^"]+)"[^>]*>)\s*</p>')


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show the version at the foot of every page."""
    config.copyright = f"fastres {VERSION}"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages made from files of the repository, and the results that pages link to."""
    for source, page in PAGES.items():
        if page != "index.md":
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for path in sorted((ROOT / "bench" / "results").rglob("*")):
        if path.suffix[1:] in RESULTS:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links within the site."""
    inside_docs = page.file.src_uri not in PAGES.values() or page.file.src_uri == "index.md"
    own = posixpath.dirname(page.file.src_uri)
    folder = posixpath.join("docs", own) if inside_docs else ""

    def within_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match["target"]))
        of_site = PAGES.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(of_site, own or ".") + (match["anchor"] or "")

    return _LINK.sub(within_site, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Describe the page, link its pictures to their files, and keep numbers with units and options on one line."""
    page.meta.setdefault("description", description(html) or f"{page.title} of {config.site_name}")
    html = _OPTION.sub('<code class="option">', _SHORT_CELL.sub(r"\1&nbsp;", html))
    return _PICTURE.sub(r'<p class="picture"><a href="\2">\1</a></p>', html)


def description(html: str) -> str:
    """Return the words of the first paragraph for an attribute of HTML, or nothing if there is no paragraph."""
    found = _PARAGRAPH.search(html)
    return "" if found is None else escape(" ".join(unescape(_TAG.sub("", found[1])).split()).removesuffix(":"))
