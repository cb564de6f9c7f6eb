"""The fsspec file systems of this process, one for each protocol. A forked process opens its own.

Nothing is cached between calls: neither listings nor facts about objects. Each request has a time limit.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from fastres.errors import InputError, MissingDependencyError, StorageError, near_matches
from fastres.extras import install

from .failures import TRIES
from .urls import GS, S3, protocol_of, redacted, url_text

CONNECT_SECONDS, ANSWER_SECONDS, REQUEST_SECONDS = 10, 30, 120
CONNECTIONS = 32  # of one process to a store
_EXTRAS = {**dict.fromkeys(S3, "s3"), **dict.fromkeys(GS, "gcs")}
_OWN_PATHS = (*S3, *GS, "memory")  # their URLs have nothing but the path
_VARIABLES = ("AWS_", "GOOGLE_", "STORAGE_EMULATOR_HOST")

# By process, so that a forked one does not use its parent's. Entries of other processes stay: to delete such a file
# system would use the connections of the parent.
_opened: dict[tuple[Any, ...], Any] = {}


def filesystem(url: str, uploads: bool = False) -> Any:
    """Return fsspec's file system for ``url``. One for ``uploads`` repeats its requests itself.

    Raises ``InputError`` for an unknown protocol, ``MissingDependencyError`` if its package is not installed, and
    ``StorageError`` if it cannot be opened.
    """
    protocol = protocol_of(url)
    kind = _class(protocol, url)
    own = {} if protocol in _OWN_PATHS else kind._get_kwargs_from_urls(url)
    key = os.getpid(), protocol, uploads, repr(sorted(own.items())), _environment()
    if key not in _opened:
        try:
            found = kind(**own, **_options(protocol, uploads), skip_instance_cache=True)
        except Exception as error:
            raise StorageError(
                f"{url_text(url)!r} cannot be opened by fsspec's {protocol!r}: {redacted(str(error))}"
            ) from error
        if protocol in S3:
            found.retries = 1  # ``failures.retried`` or botocore tries again
        _opened[key] = found
    return _opened[key]


def _environment() -> tuple[tuple[str, str], ...]:
    """Return the variables that choose credentials and endpoints: who changes them expects an effect."""
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith(_VARIABLES)))


def path_of(url: str) -> str:
    """Return the name of ``url`` in its file system."""
    return str(_class(protocol_of(url), url)._strip_protocol(url))


def _class(protocol: str, url: str) -> Any:
    try:
        from fsspec import available_protocols, get_filesystem_class
    except ImportError as error:
        raise MissingDependencyError(
            f"{url_text(url)!r} needs a package that is not installed (fsspec): pip install fsspec"
        ) from error
    try:
        return get_filesystem_class(protocol)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        advice = install(extra) if extra else str(error)
        raise MissingDependencyError(f"{url_text(url)!r} needs a package that is not installed: {advice}") from error
    except ValueError as error:
        raise InputError(
            f"{url_text(url)!r} has the unknown protocol {protocol!r}.{near_matches(protocol, available_protocols())} "
            "Use s3://, gs://, or another protocol of fsspec"
        ) from error


def _options(protocol: str, uploads: bool) -> dict[str, Any]:
    if protocol in S3:
        _quiet("s3fs", "aiobotocore", "botocore")
        given = _configured(protocol).get("config_kwargs")
        config = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": ANSWER_SECONDS,
            "max_pool_connections": CONNECTIONS,
            "retries": {"mode": "standard", "total_max_attempts": TRIES if uploads else 1},
            **(given if isinstance(given, dict) else {}),
        }
        return {"config_kwargs": config, "use_listings_cache": False}
    if protocol in GS:
        _quiet("gcsfs")
        return {"requests_timeout": REQUEST_SECONDS, "use_listings_cache": False}
    return {}


def _configured(protocol: str) -> dict[str, Any]:
    """Return the arguments that the user's configuration of fsspec has for ``protocol``."""
    from fsspec.config import conf

    return dict(conf.get(protocol, {}))


def _quiet(*names: str) -> None:
    """Let packages log errors only where the user has set up logging: they are raised as well."""
    for name in names:
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
