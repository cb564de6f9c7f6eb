"""Download published checkpoints once into torch's hub cache, and verify them every time they are used.

The cache is ``torch.hub.get_dir()/checkpoints``, the same folder that torchvision uses. ``TORCH_HOME`` is respected,
and both libraries use each other's downloads. A download goes to its own temporary file beside the final one, which is
renamed only if its size and hash are right. So several processes can load the same weights at the same time, and an
interrupted download leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch

from fastres.errors import CorruptCheckpointError, DownloadError, WeightsError
from fastres.files import open_regular
from fastres.terminal import progress_bar
from fastres.version import __version__

PYTORCH_URL = "https://download.pytorch.org/models/"
URL_VARIABLE = "FASTRES_WEIGHTS_URL"
TIMEOUT = 30.0  # seconds without data from the server
_CHUNK = 1 << 20


def base_url() -> str:
    """Return the URL of the download server: ``FASTRES_WEIGHTS_URL`` or PyTorch's server; it ends with a slash."""
    return (os.environ.get(URL_VARIABLE) or PYTORCH_URL).rstrip("/") + "/"


def cache_folder() -> Path:
    """Return the folder of downloaded checkpoints, ``checkpoints`` in torch's hub folder. It may not exist yet."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def cached_checkpoint(file: str, sha256: str, progress: bool = True) -> Path:
    """Return the path of the checkpoint ``file`` in the cache; download it if it is missing, and verify its SHA-256.

    ``sha256`` is the hash in hex or the beginning of it. ``progress`` shows a bar in bytes on stderr during a download.
    Raises ``DownloadError`` if the file is not cached and cannot be downloaded, ``CorruptCheckpointError`` if the
    cached or downloaded bytes are not those of the published file, and ``WeightsError`` if the cached file cannot be
    read.
    """
    path = cache_folder() / file
    if not os.path.exists(path):  # unlike Path.exists, this does not raise if a parent folder is not accessible
        _download(file, sha256, path, progress)
        return path
    digest = file_sha256(path)
    if not digest.startswith(sha256):
        raise CorruptCheckpointError(
            f"{path} is not the published {file}: its SHA-256 begins with {digest[: len(sha256)]}, not {sha256}. "
            "fastres does not overwrite it; delete the file and load again to download it."
        )
    return path


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex (98 MiB take 0.07 s on a CPU with SHA instructions).

    Raises ``WeightsError`` if the file cannot be read.
    """
    digest = hashlib.sha256()
    view = memoryview(bytearray(_CHUNK))
    try:
        with open_regular(path) as stream:
            while count := stream.readinto(view):  # type: ignore[attr-defined]
                digest.update(view[:count])
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({_reason(error)}); check the path and its permissions") from error
    return digest.hexdigest()


def _download(file: str, sha256: str, path: Path, progress: bool) -> None:
    """Download ``file`` to ``path``; if the download fails or the hash is wrong, nothing is left at ``path``."""
    url = base_url() + file
    with _temporary(path) as (temporary, stream):
        digest = hashlib.sha256()
        with _open(url, path) as response:
            total = _content_length(response)
            received = 0
            for chunk in _chunks(response, url, total, file, progress):
                digest.update(chunk)
                received += len(chunk)
                with _writing(path):
                    stream.write(chunk)
        if total is not None and received != total:
            raise DownloadError(
                f"The download of {url} stopped after {received:,} of {total:,} bytes. Nothing was kept; load again, "
                f"or download the file another way and pass weights=<path>."
            )
        found = digest.hexdigest()
        if not found.startswith(sha256):
            raise CorruptCheckpointError(
                f"The {received:,} bytes from {url} are not {file}: their SHA-256 begins with {found[: len(sha256)]}, "
                f"not {sha256}. Nothing was kept. Check if a proxy or mirror answers instead of the server, or pass "
                f"weights=<path>."
            )
        with _writing(path):
            stream.close()
            os.replace(temporary, path)


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield a new file beside ``path``, open for writing; delete it afterwards unless it was renamed.

    ``tempfile`` is not used because only the owner may read its files, and the cache may be shared.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(temporary, "xb")  # noqa: SIM115 - closed before the rename, or below
    try:
        yield temporary, stream
    finally:
        with suppress(OSError):  # the disk may be full when the discarded data is flushed
            stream.close()
        temporary.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a failure to write to the cache folder into a ``DownloadError``."""
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"{path.name} cannot be written to the cache folder {path.parent} ({_reason(error)}). Free space there, "
            f"make it writable, set TORCH_HOME to another folder, or pass weights=<path> for a checkpoint elsewhere."
        ) from error


@contextmanager
def _open(url: str, path: Path) -> Iterator[IO[bytes]]:
    """Yield the server's response; a failed request becomes a ``DownloadError`` that lists the alternatives."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        request = Request(url, headers={"User-Agent": f"fastres/{__version__}"})
        response = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        raise DownloadError(_unavailable(url, path, f"the server answered {error.code} {error.reason}")) from error
    except (OSError, HTTPException, ValueError) as error:
        raise DownloadError(_unavailable(url, path, _reason(error))) from error
    with response:
        yield response


def _chunks(response: IO[bytes], url: str, total: int | None, file: str, progress: bool) -> Iterator[bytes]:
    """Yield the body in chunks, with a progress bar; a broken connection becomes a ``DownloadError``."""
    from http.client import HTTPException

    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with progress_bar(total=total, desc=file, disable=not progress, **options) as bar:
        while True:
            try:
                chunk = response.read(_CHUNK)
            except (OSError, HTTPException) as error:
                raise DownloadError(
                    f"The download of {url} broke off ({_reason(error)}). Nothing was kept; load again, or download "
                    f"the file another way and pass weights=<path>."
                ) from error
            if not chunk:
                return
            bar.update(len(chunk))
            yield chunk


def _content_length(response: IO[bytes]) -> int | None:
    value = response.headers.get("Content-Length")  # type: ignore[attr-defined]
    return int(value) if value and value.isdigit() else None


def _unavailable(url: str, path: Path, reason: str) -> str:
    return (
        f"{path.name} is not in the cache folder {path.parent} and could not be downloaded from {url}: {reason}. "
        f"Connect to the internet, set {URL_VARIABLE} to a mirror, copy the file into the cache folder, or pass "
        f"weights=<path>, or weights=None for random weights."
    )


def _reason(error: Exception) -> str:
    """Describe an exception in a few words; if urllib wraps another one, use the innermost reason."""
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    if isinstance(reason, Exception) and not isinstance(reason, str):
        reason = getattr(reason, "strerror", None) or reason
    return str(reason) or type(error).__name__
