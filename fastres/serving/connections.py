"""HTTP connections with limits that uvicorn does not have: on the size of a request's head, and on the time for it."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .failures import Refusal
from .settings import HEADER_SECONDS, HEADERS


class Connection(HttpToolsProtocol):
    """A connection that is closed if a request's head is too long or comes too slowly."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._clock: asyncio.TimerHandle | None = None  # runs while a head is awaited, or the rest of a refused body
        self._head = 0  # the bytes of the head so far
        self._in_body = self._refused = False
        self._answering: Any = None  # the request that is being answered; others may have arrived behind it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)
        # uvicorn tells only the last request of a connection, and uvloop raises if another one is answered.
        self.pipeline.clear()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._clock is None and (self.cycle is None or self.cycle.response_complete):
            self._start_clock()
        if not self._in_body:
            self._head += len(data)
        super().data_received(data)
        if not self._in_body and self._head > HEADERS:
            self._refuse_head()

    def on_headers_complete(self) -> None:
        self._stop_clock()
        self._in_body = True
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEADERS:
            self._refuse_head()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body, self._head = False, 0
        if not self._refused:
            super().on_message_complete()

    def _start_clock(self) -> None:
        self._clock = self.loop.call_later(HEADER_SECONDS, self._refuse_slow)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _refuse_head(self) -> None:
        self._refuse(Refusal(431, "HeaderError", f"The head of the request has more than {HEADERS:,} bytes."))

    def _refuse_slow(self) -> None:
        if self._head and not self._in_body:
            self._refuse(Refusal(408, "SlowRequestError", f"The head was not complete in {HEADER_SECONDS:g} s."))
        else:  # nothing came, or the request has its answer already
            self.transport.close()

    def _refuse(self, refusal: Refusal) -> None:
        """Answer without the application, and close the connection."""
        self._stop_clock()
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        body = json.dumps({"error": refusal.as_json()}).encode()
        reason = HTTPStatus(refusal.status).phrase
        head = (
            f"HTTP/1.1 {refusal.status} {reason}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
