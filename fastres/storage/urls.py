"""URLs of objects: ``s3://bucket/photos/a.jpg``. A URL that ends in ``/`` names everything below it, like a folder."""

from __future__ import annotations

import re

from fastres.errors import InputError
from fastres.text import path_text

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_MISTAKEN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/?[^/]|([A-Za-z][A-Za-z0-9+.-]+::)+[A-Za-z]+:/")
_PASSWORD = re.compile(r"(://)[^/@\s]*:[^/@\s]*@")
_SECRET = re.compile(
    r"([?&][^=&\s'\"]*(?:sig|token|key|credential|password|secret)[^=&\s'\"]*=)[^&\s'\"]+", re.IGNORECASE
)
LOCAL = ("file", "local")
NOT_LISTED = ("http", "https")  # servers that do not say which files they have
S3, GS = ("s3", "s3a"), ("gs", "gcs")
MISTAKEN = (
    "is neither a file nor a URL; a URL has two slashes ('s3://bucket/photos/'), and is passed as text, because "
    "pathlib.Path removes one of them"
)


def is_url(name: object) -> bool:
    """Return True if ``name`` is text that begins like a URL: ``s3://``."""
    return isinstance(name, str) and _URL.match(name) is not None


def is_mistaken_url(name: str) -> bool:
    """Return True for ``s3:/bucket/x``, which ``pathlib.Path`` makes of a URL, and for chains such as ``zip::s3://x``."""
    return not is_url(name) and _MISTAKEN.match(name) is not None


def protocol_of(url: str) -> str:
    """Return ``"s3"`` for ``s3://bucket/a.jpg``, in lower case."""
    match = _URL.match(url)
    assert match is not None
    return match[1].lower()


def checked(url: str) -> str:
    """Return ``url`` with its protocol in lower case.

    Raises ``InputError`` if it names nothing, a local file, or has a password.
    """
    protocol = protocol_of(url)
    rest = url[len(protocol) + 3 :]
    if protocol in LOCAL:
        raise InputError(f"{url!r} is a local file; pass its path, such as {'/' + rest.lstrip('/')!r}")
    if _PASSWORD.search(url):
        raise InputError(
            f"{url_text(url)!r} has a password in it, which would get into tables and messages; remove it, and give "
            "credentials in the usual way of the store, such as environment variables"
        )
    if not rest.strip("/"):
        raise InputError(f"{url!r} is incomplete; write the bucket and the path, such as '{protocol}://bucket/photos/'")
    if rest.startswith("/"):
        raise InputError(
            f"{url!r} has no bucket; write it behind '{protocol}://', such as '{protocol}://bucket/photos/'"
        )
    return f"{protocol}://{rest}"


def as_folder(url: str) -> str:
    """Return ``url`` with a slash at its end."""
    return url if url.endswith("/") else f"{url}/"


def joined(url: str, name: str) -> str:
    """Return the URL of ``name`` below ``url``."""
    return as_folder(url) + name


def last_name(url: str) -> str:
    """Return the last component: ``a.jpg`` of ``s3://bucket/a.jpg``."""
    return url.rstrip("/").rpartition("/")[2]


def bucket_of(url: str) -> str:
    """Return the bucket (the first component) of ``url``."""
    return url[len(protocol_of(url)) + 3 :].partition("/")[0]


def url_text(url: str | bytes) -> str:
    """Return ``url`` for messages and tables, without passwords and signatures."""
    return redacted(path_text(url))


def redacted(text: str) -> str:
    """Return ``text`` with ``…`` in the place of passwords and signatures in URLs."""
    return _SECRET.sub(r"\1…", _PASSWORD.sub(r"\1…@", text))
