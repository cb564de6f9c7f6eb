"""What is built for a package index has links and addresses that lead somewhere from there."""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType

import pytest

from fastres.version import __version__

from .blocks import ROOT

PLACE = "https://example.com/owner/fastres"


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docs" / "mkdocs")
    monkeypatch.delitem(sys.modules, "release", raising=False)
    return importlib.import_module("release")


def test_the_long_description_has_absolute_links(release: ModuleType) -> None:
    text = release.with_absolute_links((ROOT / "README.md").read_text(encoding="utf-8"), f"{PLACE}/")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert len(links) > 20
    for link in links:
        assert link.startswith("https://"), link
        if link.startswith(PLACE):
            kind, version, path = link.removeprefix(f"{PLACE}/").split("/", 2)
            assert (kind, version) == ("raw" if path.endswith(".svg") else "blob", f"v{__version__}")
            assert (ROOT / path.partition("#")[0]).exists(), path
    assert "<this repository>" not in text
    assert f"git clone {PLACE}/" in text


def test_the_metadata_has_the_addresses_of_the_project(release: ModuleType) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads(release.with_addresses((ROOT / "pyproject.toml").read_text(encoding="utf-8"), PLACE))
    assert project["project"]["urls"]["Source"] == PLACE
    assert project["project"]["scripts"]


@pytest.mark.parametrize("address", ["", "http://example.com/a/b", "https://example.com", "owner/fastres"])
def test_an_address_that_is_none(release: ModuleType, address: str) -> None:
    with pytest.raises(SystemExit, match="give the address of the repository"):
        release.main(address, ROOT / "never")


def test_the_citation_has_the_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
