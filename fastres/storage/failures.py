"""Failures of object stores: which ones pass by themselves, and a sentence for each that says what to do.

Every store has a package with errors of its own. They are recognised by HTTP status, error code and name of the class,
so that no such package needs to be imported here.
"""

from __future__ import annotations

import errno
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from fastres.errors import FastresError, StorageError

from .urls import GS, S3, bucket_of, protocol_of, redacted, url_text

Result = TypeVar("Result")

TRIES = 3
PAUSE = 0.5  # seconds before the second try, on average; doubled before each further one
LIST, READ, WRITE, DELETE = "listed", "read", "written", "deleted"

_PASSING_STATUS = {408, 429, 500, 502, 503, 504}
_PASSING_CODES = {
    "BandwidthLimitExceeded", "InternalError", "OperationAborted", "RequestLimitExceeded", "RequestTimeout",
    "RequestTimeoutException", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException",
    "TooManyRequests", "TooManyRequestsException",
}  # fmt: skip
_PASSING_TYPES = {
    "ChunkedEncodingError", "ClientConnectionError", "ClientPayloadError", "ConnectionError", "HTTPClientError",
    "IncompleteRead", "IncompleteReadError", "IncompleteReadException", "ResponseParserError", "ServiceRequestError",
    "ServiceResponseError", "Timeout", "TimeoutError", "TransportError",
}  # fmt: skip
_CUT_TYPES = {"ClientPayloadError", "IncompleteRead", "IncompleteReadError", "ResponseStreamingError"}
_PASSING_ERRNO = {
    errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH,
    errno.EPIPE, errno.ETIMEDOUT, getattr(errno, "EREMOTEIO", errno.EIO),
}  # fmt: skip
_CREDENTIAL_CODES = {
    "AuthFailure", "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidSecurity", "InvalidToken",
    "RequestTimeTooSkewed", "SignatureDoesNotMatch", "TokenRefreshRequired", "UnrecognizedClientException",
}  # fmt: skip
_CREDENTIAL_TYPES = {
    "ClientAuthenticationError", "CredentialRetrievalError", "DefaultCredentialsError", "NoAuthTokenError",
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "RefreshError", "SSOError",
    "TokenRetrievalError", "UnknownCredentialError",
}  # fmt: skip
_REGION_CODES = {
    "301", "307", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect",
    "TemporaryRedirect",
}  # fmt: skip
_UNREACHABLE_TYPES = {"EndpointConnectionError", "ClientConnectorError", "NewConnectionError"}

_S3_PERMISSIONS = {LIST: "s3:ListBucket", READ: "s3:GetObject", WRITE: "s3:PutObject", DELETE: "s3:DeleteObject"}
_GS_PERMISSIONS = {
    LIST: "storage.objects.list",
    READ: "storage.objects.get",
    WRITE: "storage.objects.create",
    DELETE: "storage.objects.delete",
}
_CREDENTIALS = {
    **dict.fromkeys(
        S3,
        "Credentials are found as the AWS tools find them: in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the profile "
        "AWS_PROFILE, ~/.aws, or the role of the machine. For a public bucket, set FSSPEC_S3_ANON=true",
    ),
    **dict.fromkeys(
        GS,
        "Credentials are found as Google's tools find them: in the file GOOGLE_APPLICATION_CREDENTIALS, from 'gcloud "
        "auth application-default login', or the service account of the machine. For a public bucket, set "
        "FSSPEC_GS_TOKEN=anon",
    ),
}
_ENDPOINTS = {
    **dict.fromkeys(S3, "AWS_ENDPOINT_URL or FSSPEC_S3_ENDPOINT_URL"),
    **dict.fromkeys(GS, "STORAGE_EMULATOR_HOST or FSSPEC_GS_ENDPOINT_URL"),
}


class MissingObject(StorageError):
    """There is no object with this URL."""


class DeniedObject(StorageError):
    """The credentials are good, but do not allow this for the object, or the object is in an archive."""


class Unavailable(StorageError):
    """The store or the network did not do what was asked, though it was tried several times."""


def retried(url: str, action: str, call: Callable[[], Result]) -> Result:
    """Return ``call()``; try again if it fails in a way that may pass. Raises ``StorageError``.

    ``action`` is what is done to ``url``: one of ``LIST``, ``READ``, ``WRITE`` and ``DELETE``.
    """
    for tried in range(1, TRIES + 1):
        try:
            return call()
        except FastresError:
            raise
        except Exception as error:
            failure = described(error, url, action, tried)
            if tried == TRIES or not isinstance(failure, Unavailable):
                raise failure from error
        wait(tried)
    raise AssertionError("the last try returns or raises")


def wait(tried: int) -> None:
    """Wait before the next try: about :data:`PAUSE` seconds, doubled with each try, and never the same for all."""
    time.sleep(PAUSE * 2 ** (tried - 1) * random.uniform(0.5, 1.5))


def described(error: Exception, url: str, action: str, tried: int = 1) -> StorageError:
    """Return ``error``, which a store's package raised for ``url``, as a ``StorageError`` that says what to do."""
    if isinstance(error, StorageError):
        return error
    protocol, name = protocol_of(url), repr(url_text(url))
    status, code, types = _facts(error)
    cannot = f"{name} cannot be {action}"
    credentials = _CREDENTIALS.get(protocol) or (
        f"Credentials are those of fsspec's {protocol!r}; variables FSSPEC_{protocol.upper()}_… set its arguments"
    )
    # The file system for http:// raises FileNotFoundError for whatever went wrong.
    is_missing = status == 404 or (status is None and "FileNotFoundError" in types and not types & _PASSING_TYPES)
    if code == "NoSuchBucket" or (is_missing and action == LIST and protocol in (*S3, *GS)):
        return StorageError(
            f"{cannot}: the bucket {bucket_of(url)!r} does not exist; check its name{_endpoint_advice(protocol)}"
        )
    if types & _CREDENTIAL_TYPES or code in _CREDENTIAL_CODES or status == 401:
        return StorageError(f"{cannot}, for lack of valid credentials: {_reason(error)} {credentials}")
    if code == "InvalidObjectState":
        return DeniedObject(f"{cannot}: it is in an archive (such as Glacier); restore it first")
    if status == 403 or "PermissionError" in types or str(error).startswith("Forbidden"):
        permissions = _S3_PERMISSIONS if protocol in S3 else _GS_PERMISSIONS if protocol in GS else {}
        permission = permissions.get(action)
        needed = f"It needs the permission {permission}. " if permission else ""
        return DeniedObject(f"{cannot}: access is denied. {needed}{credentials}")
    if is_missing:
        return MissingObject(f"{name} does not exist")
    if code in _REGION_CODES:
        return StorageError(
            f"{cannot}: the bucket {bucket_of(url)!r} is in another region, or elsewhere; set AWS_DEFAULT_REGION"
            f"{_endpoint_advice(protocol)}"
        )
    if "certificate verify failed" in str(error).lower():
        return StorageError(f"{cannot}: {_reason(error)} If the store has a certificate of its own, set AWS_CA_BUNDLE")
    if _passes(error, status, code, types):
        advice = "check the network, and run it again later"
        if types & _UNREACHABLE_TYPES:
            advice = f"check the network{_endpoint_advice(protocol)}"
        times = "once" if tried == 1 else f"{tried} times"
        return Unavailable(f"{cannot}: {_reason(error)} It was tried {times}; {advice}")
    return StorageError(f"{cannot}: {_reason(error)} Check the URL{_endpoint_advice(protocol)}")


def _endpoint_advice(protocol: str) -> str:
    return f" and, for a store elsewhere, {_ENDPOINTS[protocol]}" if protocol in _ENDPOINTS else ""


def _passes(error: Exception, status: int | None, code: str | None, types: set[str]) -> bool:
    """Return True if the same request may well succeed later."""
    if status is not None or code is not None:
        return status in _PASSING_STATUS or code in _PASSING_CODES
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    return bool(types & _PASSING_TYPES) or any(
        isinstance(each, OSError) and each.errno in _PASSING_ERRNO for each in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error``, and the errors that it was raised from."""
    current: BaseException | None = error
    for _ in range(10):
        if current is None:
            return
        yield current
        current = current.__cause__


def _facts(error: Exception) -> tuple[int | None, str | None, set[str]]:
    """Return the HTTP status and the store's error code, where known, and the names of the classes of ``error``."""
    status: int | None = None
    code: str | None = None
    types: set[str] = set()
    for each in _chain(error):
        types |= {kind.__name__ for kind in type(each).__mro__}
        if types & _CUT_TYPES:  # aiohttp raises it from an error that has a status of its own
            break
        response: Any = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore
            code = code or str((response.get("Error") or {}).get("Code") or "") or None
            found = (response.get("ResponseMetadata") or {}).get("HTTPStatusCode")
        else:
            found = next(
                (
                    value
                    for holder, name in (
                        (each, "status"),
                        (each, "status_code"),
                        (response, "status_code"),
                        (each, "code"),
                    )
                    if str(value := getattr(holder, name, None)).isdigit()
                ),
                None,
            )
        if status is None and str(found).isdigit() and int(str(found)) >= 300:
            status = int(str(found))
    return status, code, types


def _reason(error: BaseException) -> str:
    """Return what went wrong as one sentence."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else ""
    if text.endswith(":"):  # the reason is below
        text = " ".join(line.strip() for line in lines[:2])
    if not text:
        text = "no answer came in time" if isinstance(error, TimeoutError) else type(error).__name__
    if len(text) > 300:
        text = f"{text[:300]}…"
    return f"{redacted(text).rstrip('.')}."
