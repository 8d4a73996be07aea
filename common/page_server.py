"""Serve a Gradio page on this machine, for nobody but its user (common/page_guard.py).

The page needs no network and sends nothing anywhere. It holds `gr.HTML` with functions of the
server; what else Gradio can do over HTTP is not answered.
"""

import os
import secrets
import threading
from typing import Any
from urllib.parse import urlsplit

from common.errors import UserError
from common.page_guard import PageGuard

# Everything that such a page asks of Gradio; nothing else is answered, no upload and no file.
ROUTES = [
    *(("GET", path) for path in ("/", "/theme.css", "/favicon.ico", "/assets/", "/static/")),
    ("GET", "/gradio_api/queue/data"),
    ("POST", "/gradio_api/queue/join"),
    ("POST", "/gradio_api/component_server/"),
]
# Gradio asks itself for the first to see that it works; browsers ask for the second without cookie.
OPEN_ROUTES = [("GET", "/gradio_api/startup-events"), ("GET", "/manifest.json")]


def check_port(port: int) -> None:
    """Raises UserError if there is no such port."""
    if not 1 <= port <= 65535:
        raise UserError(f"argument --port: expected 1 to 65535, got {port}")


def prepare() -> None:
    """Before Gradio is imported: it reports nothing, and it reaches its own page past a proxy."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for proxies in ("NO_PROXY", "no_proxy"):  # Gradio requests its own page to see that it works
        os.environ[proxies] = ",".join(filter(None, [os.environ.get(proxies), "127.0.0.1"]))


def serve(page: Any, css: str, name: str, port: int, share: bool = False, note: str = "") -> None:
    """Serve the page until Ctrl-C, after printing a note and the address that opens it.

    page: Gradio Blocks. name: of the cookie. share: give it a public address too, through Gradio's
    servers. Raises UserError if the port is in use or if Gradio gives no public address."""
    import gradio as gr  # heavy
    from starlette.middleware import Middleware

    token = secrets.token_urlsafe(24)
    shown = "" if port == 80 else f":{port}"  # as browsers write it
    hosts = {f"{host}{shown}" for host in ("127.0.0.1", "localhost")}
    guard = Middleware(
        PageGuard, token=token, cookie=f"{name}_{port}", hosts=hosts, routes=ROUTES,
        open_routes=OPEN_ROUTES,
    )  # fmt: skip
    # fonts of the system, so that none is loaded from the network
    theme = gr.themes.Default(
        primary_hue="indigo",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    try:
        _, local, public = page.launch(
            server_name="127.0.0.1", server_port=port, share=share, theme=theme, css=css,
            quiet=True, footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False,
            prevent_thread_lock=True, app_kwargs={"middleware": [guard]},
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"argument --port: {port} cannot be used ({error}); give another") from None
    if share and not public:
        raise UserError(
            "argument --share: Gradio gave no public address; leave --share out to use the page "
            "on this machine"
        )
    if public:
        hosts.add(urlsplit(public).netloc)
    if note:
        print(note)
    print(f"{(public or local).rstrip('/')}/?token={token} (Ctrl-C ends)", flush=True)
    threading.Event().wait()
