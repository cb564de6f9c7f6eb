"""Build the files of a release, with the repository's address in them: ``make release REPOSITORY=https://…``.

The README links to files by paths, which work in a checkout and on the site. On a package index they lead nowhere. The
copy in which the release is built has absolute links, at the tag of the version, and the address in its metadata.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tempfile
import urllib.parse
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSION = runpy.run_path(str(ROOT / "fastres" / "version.py"))["__version__"]
_LINK = re.compile(r"(?P<image>!?)\[(?P<words>[^\]]*)\]\((?P<target>(?!https?://|#|<)[^)\s]+)\)")
_SOURCE = re.compile(r'(?P<before><img [^>]*?src=")(?P<target>(?!https?://)[^"]+)')


def with_absolute_links(text: str, repository: str, version: str = VERSION) -> str:
    """Return Markdown whose links and pictures lead to the files of ``version`` in ``repository``."""
    place = f"{repository.rstrip('/')}/{{kind}}/v{version}/{{path}}"

    def link(match: re.Match[str]) -> str:
        kind = "raw" if match["image"] else "blob"
        return f"{match['image']}[{match['words']}]({place.format(kind=kind, path=match['target'])})"

    text = _LINK.sub(link, text.replace("<this repository>", repository))
    return _SOURCE.sub(lambda match: match["before"] + place.format(kind="raw", path=match["target"]), text)


def with_addresses(project: str, repository: str) -> str:
    """Return ``pyproject.toml`` with the addresses of the project."""
    address = repository.rstrip("/")
    urls = {
        "Source": address,
        "Documentation": f"{address}/blob/v{VERSION}/docs/index.md",
        "Changelog": f"{address}/blob/v{VERSION}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
    lines = "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    return project.replace("[project.scripts]", f"[project.urls]\n{lines}\n[project.scripts]", 1)


def main(repository: str, out: Path) -> None:
    """Build the source distribution and the wheel in ``out``, and check them."""
    parts = urllib.parse.urlsplit(repository)
    if parts.scheme != "https" or not parts.netloc or not parts.path.strip("/"):
        sys.exit(
            f"REPOSITORY is {repository!r}; give the address of the repository, such as https://host/owner/fastres"
        )
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "fastres"
        subprocess.run(["git", "clone", "-q", ROOT, copy], check=True)
        for name, change in (("README.md", with_absolute_links), ("pyproject.toml", with_addresses)):
            (copy / name).write_text(change((copy / name).read_text(encoding="utf-8"), repository), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "build", "--outdir", out, copy], check=True)
    files = sorted(out.glob(f"fastres-{VERSION}*"))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).absolute())
