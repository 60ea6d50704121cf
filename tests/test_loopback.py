"""The guard of the page: own host names only, no uploads, small requests, nothing fetched from elsewhere."""

import asyncio

import pytest

from tc_lightning.loopback import MAX_BODY, Loopback


async def echo(scope, receive, send):
    """An application that reads the whole body and tells its length."""
    length, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(length).encode()})


def ask(path="/", method="GET", host="127.0.0.1:7860", parts=(b"",), **headers):
    """(status, headers, body) of a request; no status where the connection was cut."""
    pairs = [(b"host", host.encode())] + [(k.replace("_", "-").encode(), str(v).encode()) for k, v in headers.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": pairs}
    queue = [{"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)]
    sent = []

    async def receive():
        return queue.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(Loopback(echo)(scope, receive, send))
    if not sent:
        return None, {}, b""
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


@pytest.mark.parametrize("host", ["localhost", "localhost:7860", "127.0.0.1:7860", "[::1]", "[::1]:7860", "LOCALHOST:1"])
def test_own_names(host):
    status, headers, _ = ask(host=host)
    policy = headers[b"content-security-policy"].decode()
    assert status == 200 and "default-src 'self'" in policy and "http" not in policy and "frame-ancestors 'none'" in policy


@pytest.mark.parametrize("host", ["", "evil.example", "127.0.0.1.evil.example:7860", "evil.example:127", "192.168.0.2:7860"])
def test_other_names(host):
    assert ask(host=host)[0] == 403


def test_no_uploads_and_no_other_methods():
    assert ask("/gradio_api/upload", "POST")[0] == 403 and ask("/gradio_api/upload/", "POST")[0] == 403
    assert ask(method="PUT")[0] == 405


def test_the_size_of_a_request():
    assert ask(method="POST", parts=(b"a" * MAX_BODY,), content_length=MAX_BODY)[2] == str(MAX_BODY).encode()
    assert ask(method="POST", content_length=MAX_BODY + 1)[0] == 413
    assert ask(method="POST", content_length="many")[0] == 413
    half = b"a" * (MAX_BODY // 2)
    assert ask(method="POST", parts=(half, half))[0] == 200, "without a length in its head it is counted as it comes"
    assert ask(method="POST", parts=(half, half, b"a"))[0] is None
