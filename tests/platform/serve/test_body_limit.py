"""Bodies that are too large or never end are cut off before they reach an application."""

import asyncio
from typing import Any

import pytest

from dmvae.platform.serve.body_limit import BodyLimit, Message


def exchange(chunks: list[bytes], headers: dict[bytes, bytes] | None = None, ends: bool = True) -> tuple[Any, Any, int]:
    """Send a body in chunks; return the status, what the application saw, and how many chunks were read."""
    seen: list[bytes] = []
    sent: list[Message] = []
    read = 0

    async def app(scope: Message, receive: Any, send: Any) -> None:
        seen.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Message:
        nonlocal read
        if read == len(chunks):
            await asyncio.sleep(60)
        read += 1
        return {"type": "http.request", "body": chunks[read - 1], "more_body": read < len(chunks) or not ends}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": list((headers or {}).items())}
    asyncio.run(BodyLimit(app, max_megabytes=0.001, seconds=0.2)(scope, receive, send))
    return sent[0]["status"], b"".join(seen), read


def test_a_whole_body_is_handed_on_in_one_piece() -> None:
    assert exchange([b"ab", b"", b"c"]) == (200, b"abc", 3)


def test_a_body_above_the_limit_is_cut_off_as_it_comes() -> None:
    assert exchange([b"x" * 600] * 100) == (413, b"", 2)


def test_a_body_that_is_announced_too_large_is_not_read() -> None:
    assert exchange([b"x"] * 10, {b"Content-Length": b"99999999999"}) == (413, b"", 0)


def test_a_client_that_stops_is_told_so_in_time() -> None:
    assert exchange([b"ab"], ends=False) == (408, b"", 1)


@pytest.mark.parametrize("announced", [b"-5", b"x", b"9" * 5000])
def test_a_senseless_length_does_no_harm(announced: bytes) -> None:
    status, _, _ = exchange([b"ab"], {b"content-length": announced})
    assert status in (200, 413)
