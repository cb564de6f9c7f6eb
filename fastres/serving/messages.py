"""Messages between the server and its processes: bytes with their length before them, over a Unix socket.

The processes wait for one message at a time. The server has a protocol of asyncio, which hands over a message in the
same round of the event loop in which it arrives; a stream would need another one.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import cast

_LENGTH = struct.Struct("<I")


class Messenger(asyncio.Protocol):
    """The server's end. ``arrived`` is called with each message, ``lost`` when the other end has closed."""

    def __init__(self, arrived: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        self._arrived, self._lost = arrived, lost
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not of this class

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        while len(buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
            if len(buffer) < end:
                return
            message = bytes(buffer[_LENGTH.size : end])
            del buffer[:end]
            self._arrived(message)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost()

    def send(self, *parts: bytes) -> None:
        """Send a message that consists of ``parts``; nothing happens if the other end has closed."""
        if self._transport is not None:
            self._transport.writelines([_LENGTH.pack(sum(map(len, parts))), *parts])

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Patience:
    """Calls ``give_up`` if a process takes longer than ``seconds`` for one thing, between ``begin`` and ``end``."""

    def __init__(self, seconds: float, give_up: Callable[[], None]) -> None:
        self._seconds, self._give_up = seconds, give_up
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._give_up)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def receive(connection: socket.socket) -> memoryview | None:
    """Return the next message, or ``None`` if the other end has closed."""
    head = _exactly(connection, _LENGTH.size)
    return None if head is None else _exactly(connection, *_LENGTH.unpack(head))


def send(connection: socket.socket, message: bytes) -> None:
    """Send a message. Raises ``OSError`` if the other end has closed."""
    connection.sendall(_LENGTH.pack(len(message)) + message)


def _exactly(connection: socket.socket, length: int) -> memoryview | None:
    data = memoryview(bytearray(length))
    left = data
    while left:
        try:
            count = connection.recv_into(left)
        except ConnectionError:
            return None
        if not count:
            return None
        left = left[count:]
    return data
