"""The same question to any OpenAI-compatible server (lm/openai_client.py).

A step's score is P(yes) / (P(yes) + P(no)) from the log-probs that the server lists for its answer. A server that lists none (it
ignores or refuses the parameter) is asked for several sampled verdicts instead, and the score is the share of yes among those that
can be read. Every answer is appended to a file as it arrives, so a run that is killed pays for nothing twice.
"""

import asyncio
import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import JudgeError, short
from common.files import AppendedRows
from lm.openai_client import NoLogprobs, OpenAIServer, TooLong, gather
from reward_model.protocols import Solution, StepJudge
from reward_model.templates import CHAT, NO, TEMPLATES, YES

MAX_TOKENS = 4  # of an answer: white space or a quote may come before the word
# as many as OpenAI's own endpoints allow
TOP = {"chat": {"logprobs": True, "top_logprobs": 20}, "text": {"logprobs": 5}}
VERDICT = re.compile(r"\W*(yes|no)\b", re.I)

Question = tuple[str, tuple[str, ...]]  # (prompt, steps): is the last of them right?
# {"text": what was answered, "top": for each of its tokens {spelling of yes or no: probability}, or None}
Reply = dict[str, Any]


class OpenAIJudge(StepJudge):
    """A StepJudge on a server.

    base_url: of the API (`http://localhost:8000/v1`). model: the name the server knows it by. template: None asks a chat model in a
    user's message (/chat/completions); a name in TEMPLATES sends that very text to be completed (/completions), which is what a
    base model needs (`plain`). samples: verdicts a question, where log-probs are not to be had. in_flight, timeout, max_retries:
    as in OpenAIServer. cache: JSONL file of the answers, read at the start and appended to.
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
        kept = " What was answered is kept: run again to go on." if cache else ""
        self._server = OpenAIServer("judge", base_url, in_flight, timeout, max_retries, kept)
        if template is not None and template not in TEMPLATES:
            raise JudgeError(
                f"unknown judge template {template!r}: expected one of {', '.join(TEMPLATES)}"
            )
        if samples < 1:
            raise JudgeError(f"samples must be at least 1, got {samples}")
        self.base_url, self.model, self.samples = self._server.base_url, model, samples
        self.kind, self.template = (
            ("chat", CHAT) if template is None else ("text", TEMPLATES[template])
        )
        self._gives_logprobs: bool | None = None  # not known before the first answer
        self._answers: dict[str, Reply] = {}  # by the hash of the request
        self._cache = _open_cache(cache)
        for row in self._cache.rows if self._cache else ():
            if {"key", "text"} <= row.keys():
                self._answers[row["key"]] = {"text": row["text"], "top": row.get("top")}

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> list[list[float] | None]:
        """As in StepJudge. Equal beginnings of several solutions are asked about once."""
        asked: list[list[Question]] = []
        for (prompt, steps), first in zip(solutions, skip or [0] * len(solutions), strict=True):
            asked.append([(prompt, tuple(steps[: k + 1])) for k in range(first, len(steps))])
        scores = asyncio.run(
            self._score_all(
                list(dict.fromkeys(question for questions in asked for question in questions))
            )
        )
        results = [[scores[question] for question in questions] for questions in asked]
        return [None if None in result else result for result in results]

    async def _score_all(self, questions: list[Question]) -> dict[Question, float | None]:
        """The score of every question; None where it outgrows the context."""
        async with self._server.open():
            # the first answer tells how the others are asked
            alone = 1 if self._gives_logprobs is None else 0
            scores = await gather([self._score(question) for question in questions[:alone]])
            scores += await gather([self._score(question) for question in questions[alone:]])
        return dict(zip(questions, scores, strict=True))

    async def _score(self, question: Question) -> float | None:
        prompt, steps = question
        text = (
            self.template.before.replace("{prompt}", prompt)
            + "".join(f"{step}\n" for step in steps)
            + self.template.question
        )
        try:
            score = None if self._gives_logprobs is False else await self._from_logprobs(text)
            return round(await self._from_verdicts(text) if score is None else score, 6)
        except TooLong:
            return None

    async def _from_logprobs(self, text: str) -> float | None:
        """From the first place in the answer where the server lists a yes or a no; None if there is none."""
        try:
            reply = await self._ask(text, {"temperature": 0, **TOP[self.kind]})
        except NoLogprobs:
            reply = {"top": None}
        if self._gives_logprobs is None:
            self._gives_logprobs = reply["top"] is not None
            if not self._gives_logprobs:
                print(
                    f"{self._server} gives no logprobs: a score is the share of yes among {self.samples} sampled verdicts"
                )
        for top in reply["top"] or []:
            yes, no = (sum(top.get(word, 0) for word in words) for words in (YES, NO))
            if yes + no > 0:
                return yes / (yes + no)
        return None

    async def _from_verdicts(self, text: str) -> float:
        """The share of yes among the sampled verdicts that can be read: one request each, since servers ignore `n`."""
        replies = await gather(
            [self._ask(text, {"temperature": 1, "seed": seed}) for seed in range(self.samples)]
        )
        verdicts = [
            match[1].lower()
            for match in (VERDICT.match(reply["text"]) for reply in replies)
            if match
        ]
        if not verdicts:
            raise JudgeError(
                f"{self._server}: {self.model} was asked for Yes or No {self.samples} times and answered neither, "
                f"but {short(replies[0]['text'])}: take another model"
                + (
                    " or, for a base model, a judge template such as plain"
                    if self.kind == "chat"
                    else ""
                )
            )
        return verdicts.count("yes") / len(verdicts)

    # --- requests

    async def _ask(self, text: str, parameters: dict) -> Reply:
        """The answer to one request: from the cache, or from the server and then into the cache."""
        asked = (
            {"messages": [{"role": "user", "content": text}]}
            if self.kind == "chat"
            else {"prompt": text}
        )
        body = {"model": self.model, "max_tokens": MAX_TOKENS, **asked, **parameters}
        key = hashlib.sha256(
            json.dumps([self.base_url, self.kind, body], sort_keys=True).encode()
        ).hexdigest()
        if key not in self._answers:
            self._answers[key] = await self._server.ask(self.kind, body, self._read)
            if self._cache:
                self._cache.append({"key": key, **self._answers[key]})
        return self._answers[key]

    def _read(self, answer: Any) -> Reply:
        """What matters of an answer."""
        choice = answer["choices"][0]
        text = (choice["message"]["content"] if self.kind == "chat" else choice["text"]) or ""
        logprobs = choice.get("logprobs") or {}
        if logprobs.get("content"):  # the chat form, which some servers use for both
            places = [
                [(top["token"], top["logprob"]) for top in place["top_logprobs"]]
                for place in logprobs["content"]
            ]
        else:
            places = [list((place or {}).items()) for place in logprobs.get("top_logprobs") or []]
        top: list[dict[str, float]] = [{} for _ in places]
        for found, place in zip(top, places, strict=True):
            for token, logprob in place:
                word, probability = token.strip(), math.exp(min(logprob, 0.0))
                if word in YES + NO:
                    found[word] = found.get(word, 0.0) + probability  # with and without a space
        return {"text": text + "", "top": top if any(places) else None}

    def close(self) -> None:
        if self._cache:
            self._cache.close()

    def __str__(self) -> str:
        return f"{self.base_url}: model {self.model}, {'chat' if self.kind == 'chat' else 'completions'}"


# One row of the cache; "top" is missing where the server gives no log-probs:
#   {"key": "<sha-256 of URL, endpoint and request>", "text": " Yes", "top": [{"Yes": 0.91, "No": 0.08}]}
def _open_cache(path: str | Path | None) -> AppendedRows | None:
    """The answers of earlier runs. Raises JudgeError if the file cannot be written."""
    try:
        return None if path is None else AppendedRows(path)
    except OSError as error:
        raise JudgeError(f"cache {path} cannot be written: {error.strerror}") from None
