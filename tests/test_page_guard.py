"""common/page_guard.py: who gets an answer from a page that is served on this machine."""

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from common.page_guard import PageGuard

HOST, TOKEN, COOKIE = "127.0.0.1:7860", "the-token", "page_7860=the-token"
ROUTES = [("GET", "/"), ("GET", "/assets/"), ("POST", "/save")]


class Inner:
    """An app that answers everything, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    async def __call__(self, scope, receive, send):
        self.asked.append((scope["method"], scope["path"]))
        headers = {"x-frame-options": "ALLOW", "set-cookie": "a=b"}
        await PlainTextResponse("text", headers=headers)(scope, receive, send)


@pytest.fixture
def inner() -> Inner:
    return Inner()


@pytest.fixture
def client(inner) -> TestClient:
    hosts = {HOST, "localhost:7860"}
    guard = PageGuard(inner, TOKEN, "page_7860", hosts, ROUTES, [("GET", "/started")])
    return TestClient(guard, base_url=f"http://{HOST}", follow_redirects=False)


def test_the_printed_address_gives_a_cookie_that_opens_the_page(client, inner):
    assert client.get("/").status_code == 401
    assert client.get("/?token=another").status_code == 401
    assert client.get("/?token=%E2%82%AC").status_code == 401
    entered = client.get(f"/?token={TOKEN}")
    assert entered.status_code == 200 and 'http-equiv="refresh"' in entered.text
    cookie = entered.headers["set-cookie"]
    assert cookie == f"page_7860={TOKEN}; HttpOnly; SameSite=Strict; Path=/"
    assert not inner.asked
    client.cookies.set("page_7860", TOKEN)
    assert client.get("/").text == "text" and client.post("/save").text == "text"
    assert inner.asked == [("GET", "/"), ("POST", "/save")]


@pytest.mark.parametrize("host", [HOST, "localhost:7860", "LOCALHOST:7860"])
@pytest.mark.parametrize("origin", [None, f"http://{HOST}", "http://localhost:7860"])
def test_the_page_itself(client, host, origin):
    headers = {"host": host, "cookie": COOKIE, "sec-fetch-site": "same-origin"}
    assert client.post("/save", headers=headers | ({"origin": origin} if origin else {})).is_success


CROSS = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:7860"},
        {"host": "evil.example"},
        {"host": "127.0.0.1"},
        {"host": "127.0.0.1:7861"},
        {"host": "127.0.0.1:7860.evil.example"},
        {"host": "0.0.0.0:7860"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "http://127.0.0.1"},
        {"origin": "http://127.0.0.1:7860.evil.example"},
        {"origin": "http://evil.example@127.0.0.1:7860"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "file://"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        CROSS | {"sec-fetch-dest": "iframe"},
    ],
)
def test_other_names_and_pages_get_nothing(client, inner, headers):
    for method, path in [("GET", "/"), ("POST", "/save"), ("GET", f"/?token={TOKEN}")]:
        answer = client.request(method, path, headers={"cookie": COOKIE} | headers)
        assert answer.status_code == 401 and "text" not in answer.text, path
        assert "set-cookie" not in answer.headers
    assert not inner.asked


def test_a_link_on_another_page_opens_the_page_and_sends_nothing(client):
    assert client.get("/", headers={"cookie": COOKIE} | CROSS).is_success
    assert client.post("/save", headers={"cookie": COOKIE} | CROSS).status_code == 401


@pytest.mark.parametrize(
    "cookie",
    ["", "page_7860=", "page_7860=x", "page_7861=the-token", "page_7860", "=", "\xff", ";"],
)
def test_without_the_token_there_is_nothing(client, inner, cookie):
    for method, path in [("GET", "/"), ("POST", "/save"), ("GET", "/assets/a.js"), ("HEAD", "/")]:
        answer = client.request(method, path, headers={"cookie": cookie.encode("latin-1")})
        assert answer.status_code == 401
    assert not inner.asked and client.get("/started").is_success


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/upload"),
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/assets"),
        ("GET", "/assets/../save"),
        ("GET", "/assets/%2e%2e/save"),
        ("POST", "/assets/a.js"),
        ("POST", "/save/more"),
        ("GET", "/save"),
        ("OPTIONS", "/save"),
        ("PUT", "/"),
        ("GET", "//"),
    ],
)
def test_only_the_routes_of_the_page_are_answered(client, inner, method, path):
    answer = client.request(method, f"http://{HOST}{path}", headers={"cookie": COOKIE})
    assert answer.status_code == 404 and not inner.asked
    assert client.get("/assets/a.js", headers={"cookie": COOKIE}).is_success


def test_every_answer_keeps_others_out_of_the_page(client):
    for answer in (client.get("/"), client.get("/", headers={"cookie": COOKIE})):
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers.get_list("x-frame-options") == ["DENY"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["set-cookie"] == "a=b"  # the app's own headers stay


def test_no_websocket(client):
    request = client.websocket_connect("/", headers={"cookie": COOKIE})
    with pytest.raises(WebSocketDisconnect), request:
        pass
