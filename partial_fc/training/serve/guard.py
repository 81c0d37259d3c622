"""What stands before every request: who may ask, how much may be sent, and what every answer says to browsers.

request ── too many at once ──> 503
        ── Host, Origin, or the token ──> 400, 403, 401
        ── bytes of the body, time for them ──> 413, 408
answer  ── headers: no other site may frame, embed or script it; nothing is stored

Without a token only programs of this machine can connect, but the browser of its user runs the scripts of other sites.
So the name that the browser asked for must be one of this machine (else a site could point its own name here), and a
request that changes something, or carries an image, must not come from a page of another site.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from partial_fc.training.serve.uploads import Refused

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
AT_ONCE = 64  # requests; beyond, memory for their bodies would have no bound
SECONDS = 120.0  # for the whole body of a request
HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    b"img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


class Guard:
    """ASGI middleware around `app`. token: what /api/ asks for, or None. most_bytes: of the body of a request.
    at_once: requests in work."""

    def __init__(
        self, app: App, *, token: str | None, most_bytes: int, seconds: float = SECONDS, at_once: int = AT_ONCE
    ) -> None:
        self.app = app
        self.token = token
        self.most_bytes = most_bytes
        self.seconds = seconds
        self.at_once = at_once
        self._in_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", []), *HEADERS.items()]
            await send(message)

        self._in_work += 1
        try:
            if self._in_work > self.at_once:
                raise Refused(503, "the service is busy; ask again in a moment")
            headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
            self._check_sender(scope, headers)
            self._check_length(headers)
            await self.app(scope, self._limited(receive), send_with_headers)
        except Refused as refused:
            if not started:
                await _answer(refused, send_with_headers)
        finally:
            self._in_work -= 1

    def _check_sender(self, scope: Scope, headers: dict[bytes, str]) -> None:
        if self.token is not None:
            if scope["path"].startswith("/api/"):
                scheme, _, given = headers.get(b"authorization", "").partition(" ")
                right = hmac.compare_digest(given.strip().encode(), self.token.encode())
                if scheme.lower() != "bearer" or not right:
                    raise Refused(401, "a token is needed: send the header Authorization: Bearer TOKEN")
            return
        host = headers.get(b"host", "")
        if _name_of(host) not in LOOPBACK:
            raise Refused(400, "ask for this service by localhost, or start it with a token")
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get(b"origin")
            foreign = origin is not None and urlsplit(origin).netloc != host
            if foreign or headers.get(b"sec-fetch-site") in ("cross-site", "same-site"):
                raise Refused(403, "this request is from a page of another site")

    def _check_length(self, headers: dict[bytes, str]) -> None:
        length = headers.get(b"content-length", "0")
        if not length.isdigit() or len(length) > 18:
            raise Refused(400, "the header Content-Length is not a number of bytes")
        if int(length) > self.most_bytes:
            raise self._too_large()

    def _too_large(self) -> Refused:
        return Refused(413, f"the request is too large; at most {self.most_bytes:,} bytes are taken")

    def _limited(self, receive: Receive) -> Receive:
        """Return `receive` with the limits on bytes and time, which hold without a Content-Length as well."""
        left = self.most_bytes
        end: float | None = None
        complete = False

        async def limited() -> Message:
            nonlocal left, end, complete
            if complete:  # what comes now is only that the sender has gone
                return await receive()
            loop = asyncio.get_running_loop()
            end = loop.time() + self.seconds if end is None else end
            try:
                message = await asyncio.wait_for(receive(), max(end - loop.time(), 0.0))
            except (asyncio.TimeoutError, TimeoutError):
                raise Refused(408, f"the request did not arrive within {self.seconds:.0f} seconds") from None
            left -= len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if left < 0:
                raise self._too_large()
            return message

        return limited


def _name_of(host: str) -> str | None:
    """Return the name in a Host header, without the port; None if it is no host."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


async def _answer(refused: Refused, send: Send) -> None:
    body = json.dumps({"error": refused.message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.status in (408, 413, 503):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
