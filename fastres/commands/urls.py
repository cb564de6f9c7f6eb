"""Download an image from a URL."""

from __future__ import annotations

import http.client
import io
import urllib.error
import urllib.request
from contextlib import closing

from fastres.errors import ImageError
from fastres.version import __version__

SCHEMES = ("http", "https")
SECONDS = 30  # without a byte from the server
LARGEST = 1 << 28  # bytes


def is_url(name: str) -> bool:
    """Return True if ``name`` is a URL that :func:`fetched` can download."""
    return name.partition("://")[0].lower() in SCHEMES and "://" in name


def fetched(url: str) -> io.BytesIO:
    """Return the content behind ``url`` as a file with the URL as its name. Redirects and proxies are followed.

    Raises ``ImageError``, which names the URL, if there is no answer, another status than 200, or too many bytes.
    """
    try:
        request = urllib.request.Request(url, headers={"User-Agent": f"fastres/{__version__}", "Accept": "image/*"})
        with closing(_opener().open(request, timeout=SECONDS)) as answer:
            data = answer.read(LARGEST + 1)
            missing = answer.length if isinstance(answer, http.client.HTTPResponse) else None
    except urllib.error.HTTPError as error:
        raise ImageError(f"{url!r} cannot be downloaded: the server answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ImageError(
            f"{url!r} cannot be downloaded: {getattr(reason, 'strerror', None) or reason or type(reason).__name__}"
        ) from error
    if len(data) > LARGEST:
        raise ImageError(f"{url!r} has more than {LARGEST:,} bytes; give the URL of one image")
    if missing:
        raise ImageError(f"{url!r} cannot be downloaded: the connection ended {missing:,} bytes too early; try again")
    file = io.BytesIO(data)
    file.name = url
    return file


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for HTTP and HTTPS alone, so that no redirect leads to a file of this machine."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
