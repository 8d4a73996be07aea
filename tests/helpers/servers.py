"""Servers for tests: one on loopback that plays prepared answers, stand-ins that answer and refuse
as servers document it, and `transformers serve`."""

import json
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from functools import partial
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
    chosen = [next(iter(place)) for place in places]
    own = [place[token] for token, place in zip(chosen, top, strict=True)]
    logprobs = {"tokens": chosen, "token_logprobs": own, "top_logprobs": top} if places else None
    choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": logprobs}
    return {"id": "1", "object": "text_completion", "choices": [choice]}


SURE = chat("Yes", {"Yes": 0.9, "No": 0.1})
JSON = {"Content-Type": "application/json"}


class Server:
    """An HTTP server on loopback that gives prepared answers; a context manager.

    `answer(number of the request, its body)` returns a JSON object, (status, headers, bytes or an
    iterator of them), or None to drop the connection. `requests` holds all requests, `most` the
    most at once."""

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
                headers = JSON | headers
                if isinstance(content, bytes):
                    headers["Content-Length"] = str(len(content))
                    content = [content]
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with suppress(ConnectionError):  # the client has read enough
                    for piece in content:
                        self.wfile.write(piece)

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
    "request": (error(400, "the model cannot do this"), "400.*cannot do this"),
    "dropped connection": (None, "cannot be reached"),
    "web page": (
        (200, {"Content-Type": "text/html"}, b"<html>\n<b>Welcome</b>\n</html>"),
        "no completion: '<html> <b>Welcome",
    ),
    "a page with a title": (
        (502, {"Content-Type": "text/html"}, b"<html><head><title>Bad gateway</title></head>..."),
        "502: a web page: Bad gateway: see the server's log",
    ),
    "no words": ((503, {}, b""), "503: no word of a reason: see the server's log"),
    "redirect": ((307, {"Location": "http://elsewhere/v1"}, b""), "redirects to http://elsewhere"),
    "error in a stream": (
        (200, {}, b'event: error\ndata: {"error": {"message": "the model crashed"}}\n\n'),
        "400: the model crashed",
    ),
    "stream": (
        (200, {}, b'data: {"choices": [{"delta": {"content": "Yes"}}]}\n\ndata: [DONE]\n'),
        "no completion: .data: {",
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


# --- stand-ins

YES_OR_NO = {"Yes": 0.7, "No": 0.15, " yes": 0.1, "no": 0.05}  # P(yes) is 0.8


def _answer(body: dict, count: int | None) -> dict:
    """`Yes`, with the `count` most probable words of YES_OR_NO."""
    places = [dict(list(YES_OR_NO.items())[:count])] if count else []
    return chat("Yes", *places) if "messages" in body else completion("Yes", *places)


def openai_api(body: dict, most: int = 20, reasons: bool = False) -> dict | tuple:
    """OpenAI's own: at most 20 log-probs in a chat and 5 in a completion. reasons: a model that
    thinks takes other parameters."""
    count = body.get("top_logprobs", 0) if "messages" in body else body.get("logprobs", 0)
    limit = most if "messages" in body else 5
    name = "top_logprobs" if "messages" in body else "logprobs"
    if reasons and "max_tokens" in body:
        return _openai_error(
            "Unsupported parameter: 'max_tokens' is not supported with this model. "
            "Use 'max_completion_tokens' instead.",
            "max_tokens",
            "unsupported_parameter",
        )
    if reasons and body.get("temperature", 1) != 1:
        return _openai_error(
            "Unsupported value: 'temperature' does not support 0 with this model. "
            "Only the default (1) value is supported.",
            "temperature",
            "unsupported_value",
        )
    if reasons and "logprobs" in body:
        return _openai_error(
            "Unsupported parameter: 'logprobs' is not supported with this model.",
            "logprobs",
            "unsupported_parameter",
        )
    if count > limit:
        message = f"Invalid value for '{name}': must be less than or equal to {limit}."
        return _openai_error(message, name, "integer_above_max_value")
    return _answer(body, count)


def _openai_error(message: str, parameter: str, code: str) -> tuple:
    error = {"message": message, "type": "invalid_request_error", "param": parameter, "code": code}
    return 400, {}, json.dumps({"error": error}).encode()


def vllm(body: dict, most: int = 20) -> dict | tuple:
    """vLLM with --max-logprobs MOST."""
    count = body.get("top_logprobs") if "messages" in body else body.get("logprobs")
    if count and count > most:
        message = f"Requested sample logprobs of {count}, which is greater than max allowed: {most}"
        words = {"object": "error", "message": message, "type": "BadRequestError", "param": None}
        return 400, {}, json.dumps({**words, "code": 400}).encode()
    answer = _answer(body, count)
    answer["choices"][0]["stop_reason"] = None
    return answer


def tgi(body: dict) -> dict | tuple:
    """Text Generation Inference: at most 5 log-probs, none in /v1/completions; errors are 422."""
    if "messages" not in body:
        return completion("Yes")
    if body.get("top_logprobs", 0) > 5:
        given = body["top_logprobs"]
        words = f"Input validation error: `top_n_tokens` must be >= 0 and <= 5. Given: {given}"
        return 422, {}, json.dumps({"error": words, "error_type": "validation"}).encode()
    answer = _answer(body, body.get("top_logprobs"))
    answer["choices"][0]["finish_reason"] = "eos_token"
    return answer


def llama_cpp(body: dict) -> dict | tuple:
    """llama.cpp's server: the chat form at both endpoints."""
    answer = _answer(body, None)
    if body.get("logprobs"):
        content = chat("Yes", YES_OR_NO)["choices"][0]["logprobs"]["content"]
        for place in (content[0], *content[0]["top_logprobs"]):
            place |= {"id": 9642, "bytes": [89, 101, 115]}
        answer["choices"][0]["logprobs"] = {"content": content}
    return answer


def old_llama_cpp(body: dict) -> dict | tuple:
    """llama.cpp's server before 2025: its own form beside the choices."""
    probs = [{"tok_str": token, "prob": p} for token, p in YES_OR_NO.items()]
    return completion("Yes") | {"completion_probabilities": [{"content": "Yes", "probs": probs}]}


def together(body: dict) -> dict | tuple:
    """Together and others: `logprobs` is a number in a chat too, and the answer has lists."""
    if body.get("logprobs") is True:
        words = {"loc": ["body", "logprobs"], "msg": "Input should be a valid integer"}
        return 422, {}, json.dumps({"detail": [words]}).encode()
    answer = chat("Yes")
    if "logprobs" in body:
        answer["choices"][0]["logprobs"] = completion("Yes", YES_OR_NO)["choices"][0]["logprobs"]
    return answer


def transformers_stand_in(body: dict) -> dict | tuple:
    """`transformers serve` ignores what it does not know."""
    return _answer(body, None)


# name -> (the server, the judge's template: None for a chat, its score, requests for it and for one
# more question)
STAND_INS = {
    "OpenAI, chat": (openai_api, None, 0.8, (1, 1)),
    "OpenAI, completion": (openai_api, "plain", 0.8, (1, 1)),
    "OpenAI, at most 2": (partial(openai_api, most=2), None, 0.823529, (2, 1)),  # 0.7 and 0.15
    "OpenAI, a reasoning model": (partial(openai_api, reasons=True), None, 1.0, (3 + 3 * 2, 3)),
    "vLLM, chat": (vllm, None, 0.8, (1, 1)),
    "vLLM, completion": (vllm, "plain", 0.8, (1, 1)),
    "vLLM, at most 3": (partial(vllm, most=3), "chatml", 0.842105, (2, 1)),
    "vLLM, at most 5": (partial(vllm, most=5), None, 0.8, (2, 1)),
    "TGI, chat": (tgi, None, 0.8, (2, 1)),
    "TGI, completion": (tgi, "plain", 1.0, (1 + 3, 3)),
    "llama.cpp, chat": (llama_cpp, None, 0.8, (1, 1)),
    "llama.cpp, completion": (llama_cpp, "plain", 0.8, (1, 1)),
    "llama.cpp before 2025": (old_llama_cpp, "plain", 0.8, (1, 1)),
    "Together": (together, None, 0.8, (2, 1)),
    "transformers serve, chat": (transformers_stand_in, None, 1.0, (1 + 3, 3)),
    "transformers serve, completion": (transformers_stand_in, "plain", 1.0, (1 + 3, 3)),
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
