"""Requests to an OpenAI-compatible server: hosted models, vLLM, SGLang, llama.cpp, `transformers serve`.

Many at once, sent again by the client's own means; what goes wrong in the end is one line. No key is taken but OPENAI_API_KEY's
from the environment, and none is written anywhere.
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
    r"context.?(length|size|window)|too (long|many tokens)|maximum (number of )?tokens|max_model_len",
    re.I,
)

Reply = TypeVar("Reply")


class TooLong(Exception):
    """The text, with what may be written behind it, outgrows the model's context."""


class NoLogprobs(Exception):
    """The server refuses to give log-probs."""


class Stopped(ServerError):
    """Not asked any more, since another request failed."""


class OpenAIServer:
    """The server at base_url (`http://localhost:8000/v1`).

    name: what it is to the user, `judge` or `policy`: errors begin with it. in_flight: most requests at once. timeout: seconds a
    request; max_retries: how often it is sent again after a timeout, a lost connection, a rate limit or a server's fault, with the
    client's growing pauses. kept: added to errors after which one may go on. Raises ServerError for arguments that cannot do."""

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
        key = os.environ.get("OPENAI_API_KEY") or ("none" if _is_loopback(host) else None)
        if key is None:
            raise ServerError(
                f"{name} {base_url}: no key: set OPENAI_API_KEY in the environment (to anything, if none is needed)"
            )
        self._settings = {
            "base_url": self.base_url,
            "api_key": key,
            "timeout": timeout,
            "max_retries": max_retries,
        }
        self._called = f"{name} {self.base_url}"

    def __str__(self) -> str:
        return self._called

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Inside of it, in one event loop, the server may be asked."""
        self._slots, self._failed = asyncio.Semaphore(self.in_flight), False
        async with openai.AsyncOpenAI(**self._settings) as self._client:
            yield

    async def ask(self, kind: str, body: dict, read: Callable[[Any], Reply]) -> Reply:
        """What `read` makes of the answer to one request; kind: `chat` (/chat/completions) or `text` (/completions). After a
        failure nothing more is begun. Raises ServerError, TooLong, NoLogprobs."""
        async with self._slots:
            if self._failed:  # what is under way is waited for, nothing more is begun
                raise Stopped
            try:
                answer = await self._request(kind, body)
                try:
                    return read(json.loads(answer))
                except (
                    ValueError,
                    KeyError,
                    IndexError,
                    TypeError,
                    AttributeError,
                    RecursionError,
                ):
                    raise ServerError(
                        f"{self} answered what is no completion: {short(' '.join(answer.split()))}: does the URL lead to an "
                        "OpenAI-compatible server?"
                    ) from None
            except ServerError:
                self._failed = True
                raise

    async def _request(self, kind: str, body: dict) -> str:
        """The text of the server's answer. Retries are the client's."""
        client = self._client.chat.completions if kind == "chat" else self._client.completions
        try:
            return (await client.with_raw_response.create(**body)).text
        except UnicodeEncodeError as error:
            raise ServerError(
                f"{self}: half of a Unicode surrogate pair cannot be sent: {short(error.object)}"
            ) from None
        except openai.APITimeoutError:
            timeout, tries = self._settings["timeout"], self._settings["max_retries"] + 1
            raise ServerError(
                f"{self} did not answer within {timeout:g} s, {tries} times.{self.kept}"
            ) from None
        except openai.APIConnectionError as error:
            reason = _line(error.__cause__ or error)
            raise ServerError(
                f"{self} cannot be reached ({reason}): is the server running?{self.kept}"
            ) from None
        except openai.APIStatusError as error:
            said, status = _line(error), error.status_code
            if status in (400, 413, 422) and TOO_LONG.search(said):
                raise TooLong from None
            if status in (400, 422) and "logprobs" in body and "logprob" in said:
                raise NoLogprobs from None
            todo = {
                401: "set OPENAI_API_KEY to a key that it takes",
                403: "set OPENAI_API_KEY to a key that it takes",
                404: f"is {body['model']} a model of this server, and does the URL end in /v1?",
                429: "wait, or ask for a higher limit.",
            }.get(status, "see what the server says" if status < 500 else "see the server's log.")
            raise ServerError(
                f"{self}: {said}: {todo}{self.kept if status == 429 or status >= 500 else ''}"
            ) from None
        except openai.OpenAIError as error:
            raise ServerError(f"{self}: {_line(error)}") from None


async def gather(coroutines: list[Coroutine]) -> list:
    """Their results, in order. All are waited for, whatever becomes of some: then the first failure is raised."""
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    if failures:
        raise next(
            (failure for failure in failures if not isinstance(failure, Stopped)), failures[0]
        )
    return results


def _host(name: str, url: str) -> str:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts.hostname
    except ValueError:  # half an address of IPv6, a port that is no number
        pass
    raise ServerError(f"{name} {url!r} is no URL: expected one such as http://localhost:8000/v1")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _line(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 300 else said[:297] + "..."
