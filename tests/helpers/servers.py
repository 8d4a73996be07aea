"""Servers for tests: one on loopback that plays recorded answers, and `transformers serve`."""

import json
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def chat(text: str | None, *places: dict[str, float]) -> dict:
    """An answer of /v1/chat/completions; places: the listed probabilities for each token."""
    listed = [
        [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in place.items()]
        for place in places
    ]
    content = [{**top[0], "top_logprobs": top} for top in listed]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
        "logprobs": {"content": content} if places else None,
    }
    return {"id": "1", "object": "chat.completion", "choices": [choice]}


def completion(text: str, *places: dict[str, float]) -> dict:
    """An answer of /v1/completions."""
    top = [{token: math.log(p) for token, p in place.items()} for place in places]
    logprobs = {"tokens": [], "top_logprobs": top} if places else None
    choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs}
    return {"id": "1", "object": "text_completion", "choices": [choice]}


SURE = chat("Yes", {"Yes": 0.9, "No": 0.1})
JSON = {"Content-Type": "application/json"}


class Server:
    """An HTTP server on loopback that gives prepared answers; a context manager.

    `answer(number of the request, its body)` returns a JSON object, (status, headers, bytes), or
    None to drop the connection. `requests` holds all requests, `most` the most at once."""

    def __init__(self):
        self.requests: list[dict] = []
        self.answer = lambda number, body: SURE
        self.now = self.most = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                request = {"path": self.path, "key": self.headers["Authorization"], **body}
                with server.lock:
                    number = len(server.requests)
                    server.requests.append(request)
                    server.now += 1
                    server.most = max(server.most, server.now)
                try:
                    reply = server.answer(number, body)
                finally:
                    with server.lock:
                        server.now -= 1
                if reply is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if isinstance(reply, dict):
                    reply = 200, {}, json.dumps(reply).encode()
                status, headers, content = reply
                self.send_response(status)
                headers = JSON | headers | {"Content-Length": str(len(content))}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        http_class = type("Http", (ThreadingHTTPServer,), {"request_queue_size": 64})
        self.http = http_class(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=[0.01], daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.http.shutdown()
        self.http.server_close()


def error(status: int, message: str, **headers: str) -> tuple[int, dict, bytes]:
    """An error in OpenAI's form."""
    body = {"error": {"message": message, "type": "error", "code": None}}
    return status, headers, json.dumps(body).encode()


# name -> (answer of a server, pattern of the error message)
FAILURES = {
    "rate limit": (error(429, "quota used up"), "429.*quota used up.*wait"),
    "its fault": (error(500, "out of memory"), "500.*out of memory.*log"),
    "key": (error(401, "bad key"), "401.*bad key.*OPENAI_API_KEY"),
    "model": (error(404, "no such model"), "404.*some-model.*end in /v1"),
    "request": (error(400, "Unsupported parameter: 'max_tokens'"), "400.*max_tokens"),
    "dropped connection": (None, "cannot be reached"),
    "web page": (
        (200, {"Content-Type": "text/html"}, b"<html>\n<b>Welcome</b>\n</html>"),
        "no completion: '<html> <b>Welcome",
    ),
    "not JSON": ((200, {}, b'{"choices": ['), "no completion"),
    "not UTF-8": ((200, {}, b"\xff\xfe\x00"), "no completion"),
    "empty": ((200, {}, b""), "no completion"),
    "a list": ((200, {}, b"[]"), "no completion"),
    "nested": ((200, {}, b"[" * 100_000), "no completion"),
    "no choices": ({"choices": []}, "no completion"),
    "null": ({"choices": [{"message": None}]}, "no completion"),
    "other schema": ({"choices": [{"message": {"content": ["Yes"]}}]}, "no completion"),
    "bad log-probs": (
        {"choices": [{"message": {"content": "Yes"}, "logprobs": {"content": [1]}}]},
        "no completion",
    ),
}


@contextmanager
def transformers_serve(model: str, folder: Path):
    """(URL, process) of `transformers serve` with this model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = "from transformers.cli.transformers import main; main()"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    command = [sys.executable, "-c", serve, "serve", model, *options]
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        process.kill()
        process.wait()
        log.close()
