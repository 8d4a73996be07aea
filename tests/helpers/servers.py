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
    """An answer as /v1/chat/completions gives it; places: for every token of it the probabilities that are listed."""
    listed = [
        [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in place.items()]
        for place in places
    ]
    content = [{**top[0], "top_logprobs": top} for top in listed]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    return {
        "id": "1",
        "object": "chat.completion",
        "choices": [{**choice, "logprobs": {"content": content} if places else None}],
    }


def completion(text: str, *places: dict[str, float]) -> dict:
    """An answer as /v1/completions gives it."""
    logprobs = {
        "tokens": [],
        "top_logprobs": [{token: math.log(p) for token, p in place.items()} for place in places],
    }
    choice = {
        "index": 0,
        "text": text,
        "finish_reason": "length",
        "logprobs": logprobs if places else None,
    }
    return {"id": "1", "object": "text_completion", "choices": [choice]}


SURE = chat("Yes", {"Yes": 0.9, "No": 0.1})


class Server:
    """Plays answers: `answer(number of the request, its body)` gives a JSON object, (status, headers, bytes), or None to drop the
    connection. What was asked is in `requests`."""

    def __init__(self):
        self.requests: list[dict] = []
        self.answer, self.now, self.most, self.lock = (
            (lambda number, body: SURE),
            0,
            0,
            threading.Lock(),
        )
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append(
                        {"path": self.path, "key": self.headers["Authorization"], **body}
                    )
                    number = len(server.requests) - 1
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
                json_type = {"Content-Type": "application/json"}
                status, headers, content = (
                    (200, json_type, json.dumps(reply).encode())
                    if isinstance(reply, dict)
                    else reply
                )
                self.send_response(status)
                for name, value in (
                    json_type | headers | {"Content-Length": str(len(content))}
                ).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = type("Http", (ThreadingHTTPServer,), {"request_queue_size": 64})(
            ("127.0.0.1", 0), Handler
        )
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=[0.01], daemon=True).start()


def error(status: int, message: str, **headers: str) -> tuple[int, dict, bytes]:
    return (
        status,
        headers,
        json.dumps({"error": {"message": message, "type": "error", "code": None}}).encode(),
    )


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
    command = [
        sys.executable,
        "-c",
        serve,
        "serve",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
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
