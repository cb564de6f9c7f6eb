"""Read the images of a request: its body, the parts of a form, or URLs of hosts that the server may ask."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from yarl import URL

from .decoding import ACCEPTED
from .failures import Refusal, no_place, too_large, too_slow
from .settings import HELD_REQUESTS, Settings

_URL_SECONDS = 10.0


@dataclass(frozen=True)
class File:
    """An image file of a request: its bytes or why there are none, and its name if the client gave one."""

    content: bytes | Refusal
    name: str | None = None


class Reader:
    """Reads requests. ``most_images`` is the largest number of images in one."""

    def __init__(self, settings: Settings, most_images: int) -> None:
        self._settings, self._most_images = settings, most_images
        self._held = 0  # bytes of all requests that are not answered yet
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def files(self, request: Request, deadline: float) -> AsyncGenerator[tuple[list[File], bool], None]:
        """Yield the image files of a request, and whether it may have several. They count as held within the context.

        Raises ``Refusal``, and ``ClientDisconnect`` if the client leaves.
        """
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "FormatError", "Content-Encoding is not supported; send the file as it is.")
        held: list[int] = []
        try:
            body = await self._body(request, deadline, held)
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind == "multipart/form-data":
                yield await self._parts(request, body), True
            elif kind == "application/json":
                yield await self._fetched(body, held), True
            else:
                yield [File(body)], False
        finally:
            self._held -= sum(held)

    def _hold(self, size: int, held: list[int]) -> None:
        """Note that a request holds ``size`` bytes more. Raises ``Refusal`` if all together hold too many."""
        if self._held + size > HELD_REQUESTS * self._settings.max_bytes:
            raise no_place(1)
        self._held += size
        held.append(size)

    async def _body(self, request: Request, deadline: float, held: list[int]) -> bytes:
        limit = self._settings.max_bytes
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large(limit)
        left = deadline - time.monotonic()
        try:
            chunks = await asyncio.wait_for(self._received(request, limit, held), left)
        except asyncio.TimeoutError:
            raise too_slow(self._settings.timeout) from None
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _received(self, request: Request, limit: int, held: list[int]) -> list[bytes]:
        chunks: list[bytes] = []
        total = 0
        async for chunk in request.stream():
            total += len(chunk)
            if total > limit:
                raise too_large(limit)
            self._hold(len(chunk), held)
            chunks.append(chunk)
        return chunks

    async def _parts(self, request: Request, body: bytes) -> list[File]:
        """Return the files in a form. Other fields are ignored."""

        async def stream() -> AsyncGenerator[bytes]:
            yield body

        most = self._most_images
        parser = MultiPartParser(request.headers, stream(), max_files=most, max_fields=most)
        try:
            form = await parser.parse()
        except MultiPartException as error:
            if "Too many" in error.message:
                raise self._too_many() from None
            raise Refusal(400, "FormError", f"The form cannot be read: {error.message}") from None
        except KeyError:
            raise Refusal(400, "FormError", "The Content-Type of the form has no boundary.") from None
        except Exception as error:
            raise Refusal(400, "FormError", "The form cannot be read; send multipart/form-data.") from error
        parts = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
        if not parts:
            raise Refusal(400, "FormError", f"The form has no file; add {ACCEPTED} files (curl -F image=@photo.jpg).")
        return [File(await part.read(), part.filename) for part in parts]

    async def _fetched(self, body: bytes, held: list[int]) -> list[File]:
        """Return the files at the URLs in a document ``{"urls": [...]}``."""
        if not self._settings.allow_urls:
            raise Refusal(403, "UrlError", "This server fetches no URLs; send the bytes of the image as the body.")
        try:
            document: Any = json.loads(body)
            urls = document["urls"]
            if not urls or not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Refusal(400, "UrlError", 'The JSON must be {"urls": ["https://…", …]}.') from None
        if len(urls) > self._most_images:
            raise self._too_many()
        return list(await asyncio.gather(*(self._fetch(url, held) for url in urls)))

    async def _fetch(self, url: str, held: list[int]) -> File:
        try:
            target = self._checked(url)
            if self._session is None:
                self._session = aiohttp.ClientSession(
                    timeout=aiohttp.ClientTimeout(total=_URL_SECONDS), cookie_jar=aiohttp.DummyCookieJar(),
                    auto_decompress=False,
                )  # fmt: skip
            async with self._session.get(target, allow_redirects=False) as answer:
                if answer.status != 200:
                    advice = "; redirects are not followed" if 300 <= answer.status < 400 else ""
                    raise Refusal(422, "UrlError", f"The URL's server answered {answer.status}{advice}.")
                content = bytearray()
                async for chunk in answer.content.iter_chunked(1 << 16):
                    self._hold(len(chunk), held)
                    content += chunk
                    if len(content) > self._settings.max_bytes:
                        raise too_large(self._settings.max_bytes)
                return File(bytes(content), url)
        except Refusal as refusal:
            return File(refusal, url)
        except asyncio.TimeoutError:
            return File(Refusal(422, "UrlError", f"The URL's server did not answer in {_URL_SECONDS:g} s."), url)
        except (aiohttp.ClientError, OSError, ValueError):
            return File(Refusal(422, "UrlError", "The URL's server cannot be reached, or did not send a file."), url)

    def _checked(self, text: str) -> URL:
        """Return ``text`` as a URL of an allowed host. Raises ``Refusal``."""
        try:
            url = URL(text)
            host = url.host_subcomponent  # as it is in a header: an IPv6 address in brackets
            known = {host, f"{host}:{url.port}"} if url.explicit_port is None else {f"{host}:{url.port}"}
        except ValueError:
            raise Refusal(422, "UrlError", "The URL is not valid.") from None
        if url.scheme not in ("http", "https") or url.user or not known & set(self._settings.allow_urls):
            raise Refusal(403, "UrlError", "This server fetches URLs of certain hosts only, not this one.")
        return url

    def _too_many(self) -> Refusal:
        return Refusal(
            413, "TooLargeError", f"A request may have {self._most_images} images at most; send several requests."
        )
