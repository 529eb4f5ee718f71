"""What stands before the server's routes: a limit of requests at once, and an end to those whose client has gone
away."""

import asyncio
import json
from typing import Any

RETRY_AFTER = b"1"
"""Seconds that a client that is refused should wait."""


class Limits:
    """An ASGI application around another one, for requests that generate (all that are POSTed).

    While ``most`` of them wait or are answered, another one gets status 503 at once. When a client closes its
    connection before the whole answer is sent, what answers it is cancelled.
    """

    def __init__(self, app: Any, most: int) -> None:
        self._app, self._most, self._count = app, most, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        if self._count >= self._most:
            return await _refuse(send, self._most)
        self._count += 1
        try:
            await _until_disconnect(self._app, scope, receive, send)
        finally:
            self._count -= 1


async def _refuse(send: Any, most: int) -> None:
    message = f"{most} requests wait or are answered already; try again later"
    body = json.dumps({"error": {"message": message, "type": "overloaded"}}).encode()
    headers = [(b"content-type", b"application/json"), (b"retry-after", RETRY_AFTER)]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _until_disconnect(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """Run ``app``, which is cancelled where the client goes away first. One task alone may call ``receive``, so it
    hands the messages on."""
    messages: asyncio.Queue[Any] = asyncio.Queue()
    answering = asyncio.ensure_future(app(scope, messages.get, send))

    async def listen() -> None:
        while True:
            message = await receive()
            messages.put_nowait(message)
            if message["type"] == "http.disconnect":
                return

    listening = asyncio.ensure_future(listen())
    try:
        await asyncio.wait({answering, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            answering.cancel()
        await asyncio.wait({answering})
        if not answering.cancelled():
            answering.result()  # its exception, if there is one
    finally:
        for task in (listening, answering):
            task.cancel()
