"""Requests to an OpenAI-compatible server.

The server may be a hosted model, vLLM, SGLang, llama.cpp or `transformers serve`. Several requests
run at once, and the client repeats failed ones. A final failure is an error of one line. The only
key is OPENAI_API_KEY from the environment; it is never written anywhere.
"""

import asyncio
import ipaddress
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai

from common.errors import ServerError, short

TOO_LONG = re.compile(
    r"context.?(length|size|window)|too (long|many tokens)|maximum (number of )?tokens"
    "|max_model_len",
    re.I,
)

Reply = TypeVar("Reply")


class TooLong(Exception):
    """The prompt and the tokens asked for are longer than the model's context."""


class NoLogprobs(Exception):
    """The server refuses to give log-probs."""


class Stopped(ServerError):
    """A request that was not sent, because another one failed."""


class OpenAIServer:
    """The server at base_url (`http://localhost:8000/v1`).

    name: its role (`judge` or `policy`), with which errors begin. in_flight: the most requests at
    once. timeout: seconds for a request. max_retries: how often a request is repeated after a
    timeout, a lost connection, a rate limit or an error of the server; the client waits longer each
    time. kept: a sentence that is added to the errors after which the job can be resumed. Raises
    ServerError if an argument is wrong."""

    def __init__(
        self,
        name: str,
        base_url: str,
        in_flight: int,
        timeout: float,
        max_retries: int,
        kept: str = "",
    ):
        host = _host(name, base_url)
        if in_flight < 1:
            raise ServerError(f"in_flight must be at least 1, got {in_flight}")
        self.base_url, self.in_flight, self.kept = base_url.rstrip("/"), in_flight, kept
        self._timeout, self._max_retries = timeout, max_retries
        self._key = os.environ.get("OPENAI_API_KEY") or ("none" if _is_loopback(host) else None)
        if self._key is None:
            raise ServerError(
                f"{name} {base_url}: no key: set OPENAI_API_KEY in the environment "
                "(to any text, if the server needs none)"
            )
        self._label = f"{name} {self.base_url}"

    def __str__(self) -> str:
        return self._label

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """The context in which requests can be sent, all from one event loop."""
        self._slots, self._failed = asyncio.Semaphore(self.in_flight), False
        limits = {"timeout": self._timeout, "max_retries": self._max_retries}
        client = openai.AsyncOpenAI(base_url=self.base_url, api_key=self._key, **limits)
        async with client as self._client:
            yield

    async def ask(self, kind: str, body: dict[str, Any], read: Callable[[Any], Reply]) -> Reply:
        """Send one request. Returns read(its decoded answer).

        kind: `chat` (/chat/completions) or `text` (/completions). After a failure no further
        request is sent. Raises ServerError, TooLong, NoLogprobs."""
        async with self._slots:
            if self._failed:  # requests that were already sent are waited for
                raise Stopped
            try:
                return _parse(await self._request(kind, body), read, self)
            except ServerError:
                self._failed = True
                raise

    async def _request(self, kind: str, body: dict[str, Any]) -> str:
        """The text of the server's answer, after the client's retries."""
        client = self._client.chat.completions if kind == "chat" else self._client.completions
        try:
            return (await client.with_raw_response.create(**body)).text
        except UnicodeEncodeError as error:
            text = short(error.object)
            raise ServerError(
                f"{self}: half of a Unicode surrogate pair cannot be sent: {text}"
            ) from None
        except openai.APITimeoutError:
            waited = f"{self._timeout:g} s, {self._max_retries + 1} times"
            raise ServerError(f"{self} did not answer within {waited}.{self.kept}") from None
        except openai.APIConnectionError as error:
            reason = _line(error.__cause__ or error)
            raise ServerError(
                f"{self} cannot be reached ({reason}): is the server running?{self.kept}"
            ) from None
        except openai.APIStatusError as error:
            message, status = _line(error), error.status_code
            if status in (400, 413, 422) and TOO_LONG.search(message):
                raise TooLong from None
            if status in (400, 422) and "logprobs" in body and "logprob" in message:
                raise NoLogprobs from None
            advice = {
                401: "set OPENAI_API_KEY to a key that the server accepts",
                403: "set OPENAI_API_KEY to a key that the server accepts",
                404: f"is {body['model']} a model of this server, and does the URL end in /v1?",
                429: "wait, or ask for a higher limit.",
            }.get(status, "see the server's message" if status < 500 else "see the server's log.")
            kept = self.kept if status == 429 or status >= 500 else ""
            raise ServerError(f"{self}: {message}: {advice}{kept}") from None
        except openai.OpenAIError as error:
            raise ServerError(f"{self}: {_line(error)}") from None


def _parse(answer: str, read: Callable[[Any], Reply], server: OpenAIServer) -> Reply:
    try:
        return read(json.loads(answer))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ServerError(
            f"{server}: the answer is no completion: {short(' '.join(answer.split()))}: "
            "is the URL that of an OpenAI-compatible server?"
        ) from None


async def gather(coroutines: list[Coroutine[Any, Any, Reply]]) -> list[Reply]:
    """The results, in order. All are waited for; then the first failure, if any, is raised."""
    results: list[Any] = await asyncio.gather(*coroutines, return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    if failures:
        causes = [failure for failure in failures if not isinstance(failure, Stopped)]
        raise (causes or failures)[0]
    return results


def _host(name: str, url: str) -> str:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts.hostname
    except ValueError:  # an incomplete IPv6 address, or a port that is not a number
        pass
    raise ServerError(f"{name} {url!r} is no URL: expected one like http://localhost:8000/v1")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _line(error: BaseException) -> str:
    """The error's message in one line of at most 300 characters."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 300 else message[:297] + "..."
