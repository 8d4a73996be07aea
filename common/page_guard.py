"""Keeps everybody but its user out of a page that is served on this machine.

Any page in a browser can send requests to a server on the same machine, and a name of an attacker
can point to it (DNS rebinding). So a request is answered only if

- it asks for one of the hosts that are served (`Host`) and comes from its own page (`Origin`,
  `Sec-Fetch-Site`),
- it has the token of this server, which is in the printed address and then in a cookie,
- it asks for a route that the page needs: nothing is uploaded, no other file is read.
"""

import secrets
from collections.abc import Awaitable, Callable, Sequence
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

Asgi = Callable[[dict, Callable, Callable], Awaitable[None]]

# The page may load only what comes with it, may send nothing elsewhere, and cannot be framed.
# Gradio needs inline scripts and `new Function`.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self'; "
    "frame-ancestors 'none'; form-action 'none'; base-uri 'self'; object-src 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
# The answer to the printed address: the browser goes on to the page, whose address has no token.
# (After a redirect it would not send the cookie if the address was a link on another page.)
ENTER = '<!DOCTYPE html><title>...</title><meta http-equiv="refresh" content="0; url=/">'


class PageGuard:
    """ASGI middleware.

    cookie: the name of the cookie that holds the token; it names the port, since all servers of a
    machine share their cookies. hosts: of the served addresses, `127.0.0.1:7860`; more can be added
    later. routes: (method, path) of all requests that the page sends; a path that ends in `/`
    stands for all below it. open_routes: those that are answered without a token."""

    def __init__(
        self,
        app: Asgi,
        token: str,
        cookie: str,
        hosts: set[str],
        routes: Sequence[tuple[str, str]],
        open_routes: Sequence[tuple[str, str]] = (),
    ):
        self.app, self.token, self.cookie, self.hosts = app, token, cookie, hosts
        self.routes, self.open_routes = routes, open_routes

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # the page uses no websocket
            return await send({"type": "websocket.close", "code": 1008})
        headers = {}
        for name, value in scope["headers"]:
            if name in headers and name in (b"host", b"origin"):
                return await _answer(send, 400, f"several headers {name.decode()}")
            headers[name] = value
        request = {k.decode("latin-1"): v.decode("latin-1") for k, v in headers.items()}
        if problem := self._foreign(scope["method"], request):
            # 401 and not 403: Gradio asks until it gets one of the answers that it knows
            return await _answer(send, 401, problem)
        route = (scope["method"], scope["path"])
        if not _is_one_of(route, self.open_routes):
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if route == ("GET", "/") and given:
                if not self._is_token(given):
                    return await _answer(send, 401, "another token: open the address last printed")
                cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                return await _answer(send, 200, ENTER, {"set-cookie": cookie})
            if not self._is_token(self._from_cookie(request.get("cookie", ""))):
                return await _answer(send, 401, "open the address that the script has printed")
            if not _is_one_of(route, self.routes):
                return await _answer(send, 404, "the page has no such route")

        async def send_with_headers(message: dict) -> None:
            if message["type"] == "http.response.start":
                own = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                rest = [(k, v) for k, v in message["headers"] if k.decode().lower() not in HEADERS]
                message = {**message, "headers": [*rest, *own]}
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _foreign(self, method: str, headers: dict[str, str]) -> str | None:
        """Why a request does not come from the page, or None if it may."""
        if headers.get("host", "").lower() not in self.hosts:
            return "this name is not served"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() not in self.hosts:
            return "sent by another page"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            to_document = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
            if method != "GET" or to_document != ("navigate", "document"):  # a link is fine
                return "sent by another page"
        return None

    def _from_cookie(self, header: str) -> str:
        try:
            found = SimpleCookie(header).get(self.cookie)
        except CookieError:
            found = None
        return found.value if found else ""

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.token.encode())


def _is_one_of(route: tuple[str, str], routes: Sequence[tuple[str, str]]) -> bool:
    method, path = route
    return ".." not in path and any(
        method == m and (path == p or (p.endswith("/") and p != "/" and path.startswith(p)))
        for m, p in routes
    )


async def _answer(
    send: Callable, status: int, text: str, more: dict[str, str] | None = None
) -> None:
    kind = "text/html" if text == ENTER else "text/plain"
    body = f"{text}\n".encode()
    headers = {**HEADERS, "content-type": f"{kind}; charset=utf-8"}
    headers |= {"content-length": str(len(body)), **(more or {})}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
