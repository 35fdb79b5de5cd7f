"""Read the body of a request within a limit of size and time: in Ray Serve's proxy, before the model's process.

A client that stops in the middle of a body, or sends too much, then costs the proxy a few kilobytes and the model
nothing. Ray's proxy calls `middlewares` if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it where Ray is started, as
`local_cluster` sees to; the application applies its own limits again, for clusters that were started otherwise.
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LIMITS_VARIABLE = "DMVAE_SERVE_LIMITS"
"""Megabytes and seconds for a body, as `32.0,10.0`; set by `jobs.serve` for the proxies that it starts."""


class BodyError(Exception):
    """A body is too large, too slow, or was not sent to its end; `status` is the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


async def read_body(receive: Receive, max_megabytes: float, seconds: float) -> bytes:
    """Return the body of a request, read until it ends or breaks a limit.

    Raises:
        BodyError: 413 as soon as it is too large, 408 if it takes too long, 400 if the client hangs up.
    """
    parts, size = list[bytes](), 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise BodyError("The client hung up before the end of the body.", 400)
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > max_megabytes * 1e6:
                    raise _too_large(size, max_megabytes)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise BodyError(
            f"Request too slow: the body did not end within {seconds:g} seconds. Send it again.", 408
        ) from None


def _too_large(size: int, max_megabytes: float) -> BodyError:
    return BodyError(f"Request too large: got {size / 1e6:.1f} MB, at most {max_megabytes:g} MB allowed.", 413)


class BodyLimit:
    """An ASGI application that hands on requests whose body is complete, and answers all others itself."""

    def __init__(self, app: Any, max_megabytes: float, seconds: float) -> None:
        self._app, self._max_megabytes, self._seconds = app, max_megabytes, seconds

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"0")
        try:
            if announced.isdigit() and int(announced[:20]) > self._max_megabytes * 1e6:
                raise _too_large(int(announced[:20]), self._max_megabytes)
            body = await read_body(receive, self._max_megabytes, self._seconds)
        except BodyError as error:
            await _refuse(send, error)
            return
        is_sent = False

        async def replay() -> Message:
            nonlocal is_sent
            if is_sent:
                return await receive()
            is_sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


async def _refuse(send: Send, error: BodyError) -> None:
    content = json.dumps({"error": str(error)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    # the rest of the body is not read
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def middlewares() -> list[Any]:
    """Return what Ray Serve's proxy puts before its routes."""
    from starlette.middleware import Middleware

    megabytes, _, seconds = os.environ.get(LIMITS_VARIABLE, "32,10").partition(",")
    return [Middleware(BodyLimit, max_megabytes=float(megabytes), seconds=float(seconds))]
