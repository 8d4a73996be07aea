"""Requests to an OpenAI-compatible server.

The server may be a hosted model, vLLM, SGLang, TGI, llama.cpp or `transformers serve`. Several
requests run at once, and the client repeats failed ones. A request with a parameter that the server
refuses is changed and sent again (lm/refusals.py). A final failure is an error of one line. The
only key is OPENAI_API_KEY from the environment; it is never written anywhere, and no other host
than that of the URL gets it.
"""

import asyncio
import ipaddress
import os
import re
import sys
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import reduce
from typing import Any, TypeVar

import httpx2  # the HTTP library of openai
import openai

from common.errors import ServerError, short
from common.terminal import printable
from lm.refusals import Change, remedy
from lm.server_text import (
    check_url,
    decode,
    error_words,
    hide_secrets,
    is_error,
    without_half_surrogates,
)

TOO_LONG = re.compile(
    r"context.?(length|size|window)|too (long|many tokens)|maximum (number of )?tokens"
    r"|max_model_len|max(imum)?[ _]seq(uence)?[ _]len|reduce the length"
    r"|`inputs`( tokens)? (\+|must have less than)",
    re.I,
)
PATHS = {"chat": "/chat/completions", "text": "/completions"}
MOST_BYTES = 16 * 2**20  # of an answer; 1,024 tokens with 20 log-probs each have 2 MB
MOST_CHANGES = 8  # of one request's parameters
KEPT_HEADERS = ("retry-after", "retry-after-ms", "x-should-retry", "location")

Reply = TypeVar("Reply")


class TooLong(Exception):
    """The prompt and the tokens asked for are longer than the model's context."""


class NoLogprobs(Exception):
    """The server refuses to give log-probs of use. The message: `gives no logprobs (its words)`."""


class Stopped(ServerError):
    """A request that was not sent, because another one failed."""


class _Refused(Exception):
    """A request that the server does not accept as it is: status, words, and the parameter that it
    names."""

    def __init__(self, status: int, words: str, parameter: str | None):
        super().__init__(words)
        self.status, self.words, self.parameter = status, words, parameter


class OpenAIServer:
    """The server at base_url (`http://localhost:8000/v1`).

    name: its role (`judge` or `policy`), with which errors begin. in_flight: the most requests at
    once. timeout: seconds until the last byte of an answer. max_retries: how often a request is
    repeated after a timeout, a lost connection, a rate limit or an error of the server; the client
    waits longer each time, or as long as the server's Retry-After says (two minutes at most). kept:
    a sentence that is added to the errors after which the job can be resumed. Raises ServerError if
    an argument is wrong."""

    def __init__(
        self,
        name: str,
        base_url: str,
        in_flight: int,
        timeout: float,
        max_retries: int,
        kept: str = "",
    ):
        host = check_url(name, base_url)
        if in_flight < 1:
            raise ServerError(f"in_flight must be at least 1, got {in_flight}")
        self.base_url, self.in_flight, self.kept = base_url.rstrip("/"), in_flight, kept
        self._timeout, self._max_retries = timeout, max_retries
        self._secret = os.environ.get("OPENAI_API_KEY", "").strip() or None
        if self._secret and not re.fullmatch(r"[!-~]+", self._secret):
            raise ServerError(
                f"{name} {base_url}: OPENAI_API_KEY holds a space or a letter that is not ASCII: "
                "copy the key again"
            )
        if self._secret is None and not _is_loopback(host):
            raise ServerError(
                f"{name} {base_url}: no key: set OPENAI_API_KEY in the environment "
                "(to any text, if the server needs none)"
            )
        self._label = f"{name} {self.base_url}"
        # what the server was found to refuse, for each kind of request
        self._changes: dict[str, list[Change]] = {"chat": [], "text": []}

    def __str__(self) -> str:
        return self._label

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """The context in which requests can be sent, all from one event loop."""
        self._slots, self._failed = asyncio.Semaphore(self.in_flight), False
        client = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self._secret or "none",
            max_retries=self._max_retries,
            timeout=self._timeout,
            default_headers={"Accept-Encoding": "identity"},
            http_client=_BoundedClient(self._timeout),
        )
        async with client as self._client:
            yield

    async def ask(
        self,
        kind: str,
        body: dict[str, Any],
        read: Callable[[Any], Reply],
        least_tokens: int | None = None,
    ) -> Reply:
        """Send one request. Returns read(its decoded answer).

        kind: `chat` (/chat/completions) or `text` (/completions). body: its `max_tokens` is halved
        down to least_tokens while the server says that the context has no room for it. After a
        failure no further request is sent. Raises ServerError, TooLong, NoLogprobs."""
        async with self._slots:
            while True:
                if self._failed:  # requests that were already sent are waited for
                    raise Stopped
                try:
                    return self._parse(await self._accepted(kind, body), read)
                except ServerError:
                    self._failed = True
                    raise
                except TooLong:
                    if least_tokens is None or body["max_tokens"] <= least_tokens:
                        raise
                    body = body | {"max_tokens": max(least_tokens, body["max_tokens"] // 2)}

    def own_text(self, text: Any) -> str:
        """A text of an answer, or its parts, as it can be written to a file.

        Raises TypeError if it is no text, and ServerError if it repeats the key."""
        if isinstance(text, list):  # {"type": "thinking", ...}, {"type": "text", "text": "Yes"}
            text = "".join(part["text"] for part in text if part["type"] == "text")
        if not isinstance(text, str):
            raise TypeError("no text")
        # a short word may be the placeholder of a server without keys, and a model may write it
        key = self._secret or ""
        if len(key) >= 8 and not key.isalpha() and key in text:
            raise self._error(f"{self}: its answer repeats OPENAI_API_KEY: is the URL right?")
        return without_half_surrogates(text)

    def _error(self, message: str) -> ServerError:
        return ServerError(hide_secrets(message, self._secret))

    async def _accepted(self, kind: str, body: dict[str, Any]) -> bytes:
        """The answer to a body, changed until the server accepts it.

        A change is kept for later requests when a body with it was accepted."""
        changes: list[Change] = []
        tried: list[dict[str, Any]] = []
        while True:
            every = [*self._changes[kind], *changes]
            sent = reduce(lambda old, change: change.apply(old), every, body)
            tried.append(sent)
            try:
                content = await self._request(kind, sent)
            except _Refused as error:
                refused = error
            else:
                for change in changes:
                    if all(change.words != known.words for known in self._changes[kind]):
                        self._changes[kind].append(change)
                        print(printable(f"{self} {change.words}"), file=sys.stderr)
                return content
            following = remedy(sent, refused.words, refused.parameter)
            words = hide_secrets(refused.words, self._secret)
            if following and not following.gives_up and following.apply(sent) not in tried:
                if len(tried) <= MOST_CHANGES:
                    changes.append(following)
                    continue
            elif "logprobs" in sent and "logprob" in f"{refused.parameter} {words}".lower():
                reason = following.words if following else "gives no logprobs"
                raise NoLogprobs(f"{reason} ({_cut(words)})")
            raise self._error(f"{self}: {refused.status}: {_cut(words)}: see the server's message")

    async def _request(self, kind: str, body: dict[str, Any]) -> bytes:
        """The server's answer, after the client's retries."""
        try:
            answer = await self._client.post(PATHS[kind], body=body, cast_to=httpx2.Response)
            return answer.content
        except UnicodeEncodeError as error:
            text = short(error.object)
            failure: Exception = self._error(
                f"{self}: half of a Unicode surrogate pair cannot be sent: {text}"
            )
        except openai.APITimeoutError:
            waited = f"{self._timeout:g} s, {self._max_retries + 1} times"
            failure = self._error(f"{self} did not answer within {waited}.{self.kept}")
        except openai.APIConnectionError as error:
            reason = _cut(hide_secrets(_line(error.__cause__ or error), self._secret))
            failure = self._error(
                f"{self} cannot be reached ({reason}): is the server running?{self.kept}"
            )
        except openai.APIStatusError as error:
            failure = self._failure(body, error.response)
        except openai.OpenAIError as error:
            failure = self._error(f"{self}: {_cut(hide_secrets(_line(error), self._secret))}")
        # here, so that the library's error with the request's headers is no context of ours
        raise failure

    def _failure(self, body: dict[str, Any], response: httpx2.Response) -> Exception:
        """The error for a status of 300 or more."""
        status, (words, parameter) = response.status_code, error_words(response.content)
        if 300 <= status < 400:
            place = hide_secrets(response.headers.get("location", "nowhere"), self._secret)
            return self._error(
                f"{self}: {status}: redirects to {_cut(place)}: give the API's own URL"
            )
        if status == 413 or (status in (400, 422, 500) and TOO_LONG.search(words)):
            return TooLong()
        # some servers fail at log-probs instead of refusing them
        fails = status >= 500 and "logprobs" in body and "logprob" in words.lower()
        if status in (400, 422) or fails:
            return _Refused(status, words, parameter)
        advice = {
            401: "set OPENAI_API_KEY to a key that the server accepts",
            403: "set OPENAI_API_KEY to a key that the server accepts",
            404: f"is {body['model']} a model of this server, and does the URL end in /v1?",
            429: "wait, or ask for a higher limit.",
        }.get(status, "see the server's message" if status < 500 else "see the server's log.")
        kept = self.kept if status == 429 or status >= 500 else ""
        words = _cut(hide_secrets(words, self._secret)) or "no word of a reason"
        return self._error(f"{self}: {status}: {words}: {advice}{kept}")

    def _parse(self, content: bytes, read: Callable[[Any], Reply]) -> Reply:
        if len(content) > MOST_BYTES:
            raise self._error(f"{self}: its answer has more than {MOST_BYTES >> 20} MB")
        try:
            return read(decode(content))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            words = hide_secrets(error_words(content)[0], self._secret)
        raise self._error(
            f"{self}: the answer is no completion: {short(words)}: "
            "is the URL that of an OpenAI-compatible server?"
        )


class _BoundedClient(openai.DefaultAsyncHttpxClient):
    """An HTTP client that reads an answer whole, within a total time and up to MOST_BYTES.

    It follows no redirects: they would take the key to another host. An error body with the status
    200 gets the status that it names, so that it is treated as one."""

    def __init__(self, seconds: float):
        super().__init__(follow_redirects=False, timeout=seconds)
        self._seconds = seconds

    async def send(
        self, request: httpx2.Request, *, stream: bool = False, **options: Any
    ) -> httpx2.Response:
        try:
            async with asyncio.timeout(self._seconds):
                response = await super().send(request, stream=True, **options)
                try:
                    content = await _content(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise httpx2.ReadTimeout("the answer takes too long", request=request) from None
        status = response.status_code
        if status == 200:
            status = _true_status(content)
        headers = {name: value for name, value in response.headers.items() if name in KEPT_HEADERS}
        return httpx2.Response(status, headers=headers, content=content, request=request)


async def _content(response: httpx2.Response) -> bytes:
    """The body, decompressed, up to one byte more than MOST_BYTES."""
    received = bytearray()
    async for chunk in response.aiter_raw():
        received += chunk
        if len(received) > MOST_BYTES:
            break
    content = bytes(received[: MOST_BYTES + 1])
    # no compression was asked for, but some proxies do not care
    if response.headers.get("content-encoding", "identity").lower() in (
        "gzip",
        "x-gzip",
        "deflate",
    ):
        try:
            return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(content, MOST_BYTES + 1)
        except zlib.error:
            return b""
    return content


def _true_status(content: bytes) -> int:
    """200, or the status of an error that a server sent with 200 (400 if it names none)."""
    if len(content) > 2**16 or b"error" not in content:
        return 200
    try:
        body = decode(content)
    except (ValueError, RecursionError):
        return 200
    if not is_error(body):
        return 200
    error = body[0] if isinstance(body, list) else body
    error = error["error"] if isinstance(error.get("error"), dict) else error
    code = error.get("code") or error.get("status")
    return code if isinstance(code, int) and 400 <= code < 600 else 400


async def gather(coroutines: list[Coroutine[Any, Any, Reply]]) -> list[Reply]:
    """The results, in order. All are waited for; then the first failure, if any, is raised."""
    results: list[Any] = await asyncio.gather(*coroutines, return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    if failures:
        causes = [failure for failure in failures if not isinstance(failure, Stopped)]
        raise (causes or failures)[0]
    return results


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _line(error: BaseException) -> str:
    """The error's message in one line, or the name of its class."""
    return " ".join(str(error).split()) or type(error).__name__


def _cut(message: str) -> str:
    """At most 300 characters of a message that holds no secrets any more."""
    return message if len(message) <= 300 else message[:297] + "..."
