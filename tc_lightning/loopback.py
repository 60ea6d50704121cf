"""A guard for a page that is served on this machine to this machine: an ASGI middleware, nothing else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
HOSTS = ("localhost", "127.0.0.1", "[::1]")
MAX_BODY = 65_536  # bytes
# scripts, styles, fonts and pictures come from the page's own address and from nowhere else
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; frame-ancestors 'none'; "
    "form-action 'self'; object-src 'none'"
)


class Loopback:
    """Refuses what a page for one person on this machine never needs, and tells the browser to fetch nothing from elsewhere.

    Refused are other host names than this machine's (a foreign site that points its name here), uploads of files, and
    requests with more than `max_body` bytes.

    Args:
        app: the ASGI application.
        max_body: bytes.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], max_body: int = MAX_BODY) -> None:
        self.app, self.max_body = app, max_body

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]):
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {key.lower(): value.decode("latin-1") for key, value in scope.get("headers", ())}
        refused = self._refused(scope, headers)
        if refused is not None:
            return await _answer(send, *refused)
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            # a body without a length in its head: what exceeds the limit is cut off as if the browser had left
            return message if seen <= self.max_body else {"type": "http.disconnect"}

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        return await self.app(scope, counted, guarded)

    def _refused(self, scope: Message, headers: dict[bytes, str]) -> tuple[int, str] | None:
        host = headers.get(b"host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name.lower() not in HOSTS:
            return 403, f"this page answers to {', '.join(HOSTS)} only"
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, "accepted: GET, HEAD, POST"
        if scope["path"].rstrip("/").endswith("/upload"):
            return 403, "this page takes no files"
        length = headers.get(b"content-length", "0")
        if not length.isdigit() or int(length) > self.max_body:
            return 413, f"accepted: requests of up to {self.max_body} bytes"
        return None


async def _answer(send: Callable[[Message], Awaitable[None]], status: int, text: str) -> None:
    head = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text.encode())).encode())]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": text.encode()})
