"""The same question to any OpenAI-compatible server: hosted models, vLLM, SGLang, llama.cpp, `transformers serve`.

A step's score is P(yes) / (P(yes) + P(no)) from the log-probs that the server lists for its answer. A server that lists none (it
ignores or refuses the parameter) is asked for several sampled verdicts instead, and the score is the share of yes among those that
can be read. Every answer is appended to a file as it arrives, so a run that is killed pays for nothing twice. No key is taken
but OPENAI_API_KEY's from the environment, and none is written anywhere.
"""

import asyncio
import hashlib
import ipaddress
import json
import math
import os
import re
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

from reward_model.base import CHAT, NO, TEMPLATES, YES, JudgeError, Solution, StepJudge, short

MAX_TOKENS = 4  # of an answer: white space or a quote may come before the word
TOP = {"chat": {"logprobs": True, "top_logprobs": 20}, "text": {"logprobs": 5}}  # as many as OpenAI's own endpoints allow
VERDICT = re.compile(r"\W*(yes|no)\b", re.I)
TOO_LONG = re.compile(r"context.?(length|size|window)|too (long|many tokens)|maximum (number of )?tokens|max_model_len", re.I)

Question = tuple[str, tuple[str, ...]]  # (prompt, steps): is the last of them right?
Reply = dict[str, Any]  # {"text": what was answered, "top": for each of its tokens {spelling of yes or no: probability}, or None}


class _TooLong(Exception):
    """The text outgrows the model's context."""


class _Stopped(JudgeError):
    """Not asked any more, since another request failed."""


class _NoLogprobs(Exception):
    """The server refuses to give log-probs."""


class OpenAIJudge(StepJudge):
    """A StepJudge on a server.

    base_url: of the API (`http://localhost:8000/v1`). model: the name the server knows it by. template: None asks a chat model in a
    user's message (/chat/completions); a name in TEMPLATES sends that very text to be completed (/completions), which is what a
    base model needs (`plain`). samples: verdicts a question, where log-probs are not to be had. in_flight: most requests at
    once. timeout: seconds a request; max_retries: how often it is sent again after a timeout, a lost connection, a rate limit or
    a server's fault, with the client's growing pauses. cache: JSONL file of the answers, read at the start and appended to.
    Raises JudgeError, one line, for a server that cannot be used; the answers that arrived stay in the cache."""

    def __init__(
        self,
        base_url: str,
        model: str,
        template: str | None = None,
        samples: int = 5,
        in_flight: int = 16,
        timeout: float = 60.0,
        max_retries: int = 5,
        cache: str | Path | None = None,
    ):
        host = _host(base_url)
        if template is not None and template not in TEMPLATES:
            raise JudgeError(f"unknown judge template {template!r}: expected one of {', '.join(TEMPLATES)}")
        for name, value in (("samples", samples), ("in_flight", in_flight)):
            if value < 1:
                raise JudgeError(f"{name} must be at least 1, got {value}")
        key = os.environ.get("OPENAI_API_KEY") or ("none" if _is_loopback(host) else None)
        if key is None:
            raise JudgeError(f"judge {base_url}: no key: set OPENAI_API_KEY in the environment (to anything, if none is needed)")
        self.base_url, self.model, self.samples, self.in_flight = base_url.rstrip("/"), model, samples, in_flight
        self.kind, self.template = ("chat", CHAT) if template is None else ("text", TEMPLATES[template])
        self._settings = {"base_url": self.base_url, "api_key": key, "timeout": timeout, "max_retries": max_retries}
        self._gives_logprobs: bool | None = None  # not known before the first answer
        self._cache = _Cache(cache)

    def score_steps(self, solutions: Sequence[Solution], skip: Sequence[int] | None = None) -> list[list[float] | None]:
        """As in StepJudge. Equal beginnings of several solutions are asked about once."""
        asked: list[list[Question]] = []
        for (prompt, steps), first in zip(solutions, skip or [0] * len(solutions), strict=True):
            asked.append([(prompt, tuple(steps[: k + 1])) for k in range(first, len(steps))])
        scores = asyncio.run(self._score_all(list(dict.fromkeys(question for questions in asked for question in questions))))
        results = [[scores[question] for question in questions] for questions in asked]
        return [None if None in result else result for result in results]

    async def _score_all(self, questions: list[Question]) -> dict[Question, float | None]:
        """The score of every question; None where it outgrows the context."""
        self._slots, self._failed = asyncio.Semaphore(self.in_flight), False
        async with openai.AsyncOpenAI(**self._settings) as self._client:
            alone = 1 if self._gives_logprobs is None else 0  # the first answer tells how the others are asked
            scores = await _all([self._score(question) for question in questions[:alone]])
            scores += await _all([self._score(question) for question in questions[alone:]])
        return dict(zip(questions, scores, strict=True))

    async def _score(self, question: Question) -> float | None:
        prompt, steps = question
        text = self.template.before.replace("{prompt}", prompt) + "".join(f"{step}\n" for step in steps) + self.template.question
        try:
            score = None if self._gives_logprobs is False else await self._from_logprobs(text)
            return round(await self._from_verdicts(text) if score is None else score, 6)
        except _TooLong:
            return None

    async def _from_logprobs(self, text: str) -> float | None:
        """From the first place in the answer where the server lists a yes or a no; None if there is none."""
        try:
            reply = await self._ask(text, {"temperature": 0, **TOP[self.kind]})
        except _NoLogprobs:
            reply = {"top": None}
        if self._gives_logprobs is None:
            self._gives_logprobs = reply["top"] is not None
            if not self._gives_logprobs:
                print(f"judge {self.base_url} gives no logprobs: a score is the share of yes among {self.samples} sampled verdicts")
        for top in reply["top"] or []:
            yes, no = (sum(top.get(word, 0) for word in words) for words in (YES, NO))
            if yes + no > 0:
                return yes / (yes + no)
        return None

    async def _from_verdicts(self, text: str) -> float:
        """The share of yes among the sampled verdicts that can be read: one request each, since servers ignore `n`."""
        replies = await _all([self._ask(text, {"temperature": 1, "seed": seed}) for seed in range(self.samples)])
        verdicts = [match[1].lower() for match in (VERDICT.match(reply["text"]) for reply in replies) if match]
        if not verdicts:
            raise JudgeError(
                f"judge {self.base_url}: {self.model} was asked for Yes or No {self.samples} times and answered neither, "
                f"but {short(replies[0]['text'])}: take another model"
                + (" or, for a base model, a judge template such as plain" if self.kind == "chat" else "")
            )
        return verdicts.count("yes") / len(verdicts)

    # --- requests

    async def _ask(self, text: str, parameters: dict) -> Reply:
        """The answer to one request: from the cache, or from the server and then into the cache."""
        asked = {"messages": [{"role": "user", "content": text}]} if self.kind == "chat" else {"prompt": text}
        body = {"model": self.model, "max_tokens": MAX_TOKENS, **asked, **parameters}
        try:
            key = hashlib.sha256(json.dumps([self.base_url, self.kind, body], sort_keys=True).encode()).hexdigest()
            text.encode()
        except UnicodeEncodeError:
            raise JudgeError(f"text {short(text)}: half of a Unicode surrogate pair cannot be scored") from None
        if key not in self._cache.replies:
            async with self._slots:
                if self._failed:  # what is under way is waited for and kept, nothing more is begun
                    raise _Stopped
                try:
                    reply = self._read(await self._request(body))
                except JudgeError:
                    self._failed = True
                    raise
            self._cache.add(key, reply)
        return self._cache.replies[key]

    async def _request(self, body: dict) -> str:
        """The text of the server's answer. Retries are the client's."""
        client = self._client.chat.completions if self.kind == "chat" else self._client.completions
        kept = " What was answered is kept: run again to go on." if self._cache.path else ""
        try:
            return (await client.with_raw_response.create(**body)).text
        except openai.APITimeoutError:
            timeout, tries = self._settings["timeout"], self._settings["max_retries"] + 1
            raise JudgeError(f"judge {self.base_url} did not answer within {timeout:g} s, {tries} times.{kept}") from None
        except openai.APIConnectionError as error:
            reason = _line(error.__cause__ or error)
            raise JudgeError(f"judge {self.base_url} cannot be reached ({reason}): is the server running?{kept}") from None
        except openai.APIStatusError as error:
            said, status = _line(error), error.status_code
            if status in (400, 413, 422) and TOO_LONG.search(said):
                raise _TooLong from None
            if status in (400, 422) and "logprobs" in body and "logprob" in said:
                raise _NoLogprobs from None
            todo = {
                401: "set OPENAI_API_KEY to a key that it takes",
                403: "set OPENAI_API_KEY to a key that it takes",
                404: f"is {self.model} a model of this server, and does the URL end in /v1?",
                429: "wait, or ask for a higher limit.",
            }.get(status, "see what the server says" if status < 500 else "see the server's log.")
            raise JudgeError(f"judge {self.base_url}: {said}: {todo}{kept if status == 429 or status >= 500 else ''}") from None
        except openai.OpenAIError as error:
            raise JudgeError(f"judge {self.base_url}: {_line(error)}") from None

    def _read(self, answer: str) -> Reply:
        """What matters of an answer. Raises JudgeError if it is not of the API's form."""
        try:
            choice = json.loads(answer)["choices"][0]
            text = (choice["message"]["content"] if self.kind == "chat" else choice["text"]) or ""
            logprobs = choice.get("logprobs") or {}
            if logprobs.get("content"):  # the chat form, which some servers use for both
                places = [[(top["token"], top["logprob"]) for top in place["top_logprobs"]] for place in logprobs["content"]]
            else:
                places = [list((place or {}).items()) for place in logprobs.get("top_logprobs") or []]
            top: list[dict[str, float]] = [{} for _ in places]
            for found, place in zip(top, places, strict=True):
                for token, logprob in place:
                    word, probability = token.strip(), math.exp(min(logprob, 0.0))
                    if word in YES + NO:
                        found[word] = found.get(word, 0.0) + probability  # with and without a space
            return {"text": text + "", "top": top if any(places) else None}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise JudgeError(
                f"judge {self.base_url} answered what is no completion: {short(' '.join(answer.split()))}: does the URL lead to an "
                "OpenAI-compatible server?"
            ) from None

    def close(self) -> None:
        self._cache.close()

    def __str__(self) -> str:
        return f"{self.base_url}: model {self.model}, {'chat' if self.kind == 'chat' else 'completions'}"


class _Cache:
    """Answers by the hash of their request, kept in an append-only JSONL file. One row:

    {"key": "<sha-256 of URL, endpoint and request>", "text": " Yes", "top": [{"Yes": 0.91, "No": 0.08}]}"""

    def __init__(self, path: str | Path | None):
        self.path, self.replies, self._file = path, {}, None
        if path is None:
            return
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115 (open as long as the judge)
        except OSError as error:
            raise JudgeError(f"cache {path} cannot be written: {error.strerror}") from None
        self._file.seek(0)
        line = b"\n"
        for line in self._file:
            try:
                row = json.loads(line)
                self.replies[row["key"]] = {"text": row["text"], "top": row["top"]}
            except (ValueError, KeyError, TypeError):  # torn when a run was killed: asked again
                continue
        if not line.endswith(b"\n"):
            self._file.write(b"\n")

    def add(self, key: str, reply: Reply) -> None:
        self.replies[key] = reply
        if self._file:
            self._file.write(json.dumps({"key": key, **reply}, ensure_ascii=False).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        if self._file:
            self._file.close()


async def _all(coroutines: list[Coroutine]) -> list:
    """Their results, in order. All are waited for, whatever becomes of some: then the first failure is raised."""
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    if failures:
        raise next((failure for failure in failures if not isinstance(failure, _Stopped)), failures[0])
    return results


def _host(url: str) -> str:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts.hostname
    except ValueError:  # half an address of IPv6, a port that is no number
        pass
    raise JudgeError(f"judge {url!r} is no URL: expected one such as http://localhost:8000/v1")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _line(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 300 else said[:297] + "..."
