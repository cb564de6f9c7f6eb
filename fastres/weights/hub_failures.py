"""Say in plain words why a download from Hugging Face's hub failed.

The libraries below ``huggingface_hub`` change with its versions (requests, httpx, hf_xet), and so do the classes of
their errors. They are recognised by what huggingface_hub, the server and the system say.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

# The system's errors that come from the disk, not from the network.
_OF_THE_DISK = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "EFBIG", "EIO", "ENOTDIR", "EISDIR", "ENAMETOOLONG")
}
# Classes of requests, urllib3, http.client and httpx for an answer that breaks off.
_CUT = {"ChunkedEncodingError", "ProtocolError", "RemoteProtocolError", "IncompleteRead", "ReadError"}
_TOKEN = "set HF_TOKEN to a token of an account that may read it, or run hf auth login"


@dataclass(frozen=True)
class Failure:
    """Why something cannot be downloaded, and what to do."""

    reason: str
    advice: str

    def text(self, what: str) -> str:
        """Return the message of the error about ``what``."""
        from huggingface_hub import constants

        return (
            f"{what} is not in the local cache {constants.HF_HUB_CACHE} and cannot be downloaded from "
            f"{endpoint_text()}: {self.reason}. {self.advice}."
        )


def endpoint_text() -> str:
    """Return the address of the hub, without a password that may be in it."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def is_missing_file(error: Exception) -> bool:
    """Return True if the hub said that the commit has no such file."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def offline(repository: str) -> Failure:
    """Return why nothing is downloaded if the hub must not be asked."""
    return Failure("HF_HUB_OFFLINE is set", f"Unset it, or copy the cache of a machine on which {_run(repository)}")


def explained(error: Exception, repository: str, revision: str) -> Failure:
    """Return what huggingface_hub's ``error`` means."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    error = _innermost(error)
    page, status = f"{endpoint_text()}/{repository}", _status(error)
    if getattr(error, "errno", None) in _OF_THE_DISK:  # itself: the network's errors are of classes of the libraries
        return Failure(
            f"{constants.HF_HUB_CACHE} cannot be written ({_described(error)})",
            "Free space there, make it writable, or set HF_HOME to another folder",
        )
    if isinstance(error, GatedRepoError):
        return Failure("the model is gated", f"Ask for access at {page}, and {_TOKEN}")
    if isinstance(error, RevisionNotFoundError):
        return Failure(f"it has no revision {revision!r}", f"See its branches and tags at {page}")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return Failure(
            f"there is no such model, or it is private (the answer was {status})",
            f"Check the spelling, of the path if you meant a folder. If the model is private, {_TOKEN}",
        )
    if status == 403:
        return Failure("access is forbidden (the answer was 403)", f"See {page}, and {_TOKEN}")
    if status == 429:
        return Failure("it gets too many requests from here (the answer was 429)", f"Wait, or {_TOKEN}")
    if status is not None:
        return Failure(f"the answer was {status}", "Load it again later, or set HF_ENDPOINT to a mirror")
    return Failure(
        _described(error),
        "Check the network (HTTPS_PROXY names a proxy) and load it again, set HF_ENDPOINT to a mirror, or copy the "
        f"cache of a machine on which {_run(repository)}",
    )


def _run(repository: str) -> str:
    return f"you ran hf download {repository}"


def _status(error: Exception) -> int | None:
    """Return the status of the server's answer, if an answer is what failed."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) and status >= 400 else None


def _innermost(error: Exception) -> Exception:
    """Return the cause of huggingface_hub's statement that a file is neither on the hub nor in the cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and the exceptions that led to it."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        yield cause
        cause = cause.__cause__ or cause.__context__


def _described(error: BaseException) -> str:
    """Describe an exception in a few words: by the system's reason, its class, or the first line of its message."""
    chain = list(_chain(error))
    classes = {type(each).__name__ for each in chain}
    reason = next((text for each in chain if isinstance(text := getattr(each, "strerror", None), str)), None)
    if reason is None and any("Timeout" in name for name in classes):
        return "there was no answer in time"
    if reason is None and classes & _CUT:
        return "the connection was cut"
    own = str(error).strip().partition("\n")[0] or type(error).__name__
    return reason or f"{own:.200}".rstrip(".")
