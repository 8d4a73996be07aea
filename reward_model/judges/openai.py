"""The step judge on any OpenAI-compatible server (lm/openai_client.py).

It asks the same question as the other judges. The score of a step is P(yes) / (P(yes) + P(no)) from
the log-probs in the server's answer. A server without log-probs (it ignores or refuses the
parameter) is asked for several sampled verdicts instead, and the score is the share of yes among
the verdicts that are a yes or a no. Every answer is appended to a cache file when it arrives, so
that a killed run pays for no answer twice.
"""

import asyncio
import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import JudgeError, UserError, short
from common.files import AppendedRows
from lm.openai_client import NoLogprobs, OpenAIServer, TooLong, gather
from reward_model.protocols import Scores, Solution, StepJudge, check_positive, with_skip
from reward_model.templates import CHAT, NO, YES, named_template

MAX_TOKENS = 4  # of an answer: white space or a quote may come before the word
# the most log-probs that OpenAI's own endpoints give
TOP = {"chat": {"logprobs": True, "top_logprobs": 20}, "text": {"logprobs": 5}}
VERDICT = re.compile(r"\W*(yes|no)\b", re.I)

Question = tuple[str, tuple[str, ...]]  # (prompt, steps): is the last of them right?
# {"text": the answer, "top": for each of its tokens {spelling of yes or no: probability}, or None}
Reply = dict[str, Any]


class OpenAIJudge(StepJudge):
    """A StepJudge on a server.

    base_url: of the API (`http://localhost:8000/v1`). model: the server's name for the model.
    template: None asks a chat model in a user's message (/chat/completions); a name in TEMPLATES
    sends the text of that template to be completed (/completions), which a base model needs
    (`plain`). samples: verdicts for each question, if there are no log-probs. in_flight, timeout,
    max_retries: as in OpenAIServer. cache: JSONL file of the answers, read at the start and
    appended to.

    Raises ServerError for a server that cannot be used and JudgeError for a model that answers
    neither yes nor no, one line each; the answers that arrived stay in the cache."""

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
        kept = " The answers so far are kept: run again to resume." if cache else ""
        self._server = OpenAIServer("judge", base_url, in_flight, timeout, max_retries, kept)
        check_positive(samples=samples)
        self.base_url, self.model, self.samples = self._server.base_url, model, samples
        self.kind = "chat" if template is None else "text"
        self.template = CHAT if template is None else named_template(template)
        self._gives_logprobs: bool | None = None  # not known before the first answer
        self._cache = _open_cache(cache)
        self._answers: dict[str, Reply] = {}  # by the hash of the request
        for row in self._cache.rows if self._cache else ():
            self._answers[row["key"]] = {"text": row["text"], "top": row.get("top")}

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> Scores:
        """As in StepJudge. A prefix that several solutions share is asked about once."""
        asked: list[list[Question]] = [
            [(prompt, tuple(steps[: k + 1])) for k in range(first, len(steps))]
            for prompt, steps, first in with_skip(solutions, skip)
        ]
        different = dict.fromkeys(question for questions in asked for question in questions)
        scores = asyncio.run(self._score_all([*different]))
        results: Scores = []
        for questions in asked:
            found = [scores[question] for question in questions]
            known = [score for score in found if score is not None]
            results.append(known if len(known) == len(found) else None)
        return results

    async def _score_all(self, questions: list[Question]) -> dict[Question, float | None]:
        """The score of every question; None if it is longer than the context."""
        async with self._server.open():
            # the first answer shows whether the server gives log-probs
            alone = 1 if self._gives_logprobs is None else 0
            scores = await gather([self._score(question) for question in questions[:alone]])
            scores += await gather([self._score(question) for question in questions[alone:]])
        return dict(zip(questions, scores, strict=True))

    async def _score(self, question: Question) -> float | None:
        prompt, steps = question
        lines = "".join(f"{step}\n" for step in steps)
        text = self.template.before.replace("{prompt}", prompt) + lines + self.template.question
        try:
            score = None if self._gives_logprobs is False else await self._from_logprobs(text)
            return round(await self._from_verdicts(text) if score is None else score, 6)
        except TooLong:
            return None

    async def _from_logprobs(self, text: str) -> float | None:
        """The score from the first token for which the server lists a yes or a no; None if there is
        no such token."""
        try:
            reply = await self._ask(text, {"temperature": 0, **TOP[self.kind]})
        except NoLogprobs:
            reply = {"top": None}
        if self._gives_logprobs is None:
            self._gives_logprobs = reply["top"] is not None
            if not self._gives_logprobs:
                instead = f"the share of yes among {self.samples} sampled verdicts"
                print(f"{self._server} gives no logprobs: a score is {instead}")
        for top in reply["top"] or []:
            yes, no = (sum(top.get(word, 0) for word in words) for words in (YES, NO))
            if yes + no > 0:
                return yes / (yes + no)
        return None

    async def _from_verdicts(self, text: str) -> float:
        """The share of yes among the sampled verdicts that are a yes or a no. Each verdict is one
        request, since some servers ignore `n`."""
        bodies = [{"temperature": 1, "seed": seed} for seed in range(self.samples)]
        replies = await gather([self._ask(text, body) for body in bodies])
        matches = [VERDICT.match(reply["text"]) for reply in replies]
        verdicts = [match[1].lower() for match in matches if match]
        if not verdicts:
            hint = " or, for a base model, a judge template such as plain"
            raise JudgeError(
                f"{self._server}: {self.model} was asked for Yes or No {self.samples} times and "
                f"answered neither, but {short(replies[0]['text'])}: take another model"
                f"{hint if self.kind == 'chat' else ''}"
            )
        return verdicts.count("yes") / len(verdicts)

    # --- requests

    async def _ask(self, text: str, parameters: dict) -> Reply:
        """The answer to one request, from the cache or else from the server."""
        body: dict[str, Any] = {"model": self.model, "max_tokens": MAX_TOKENS}
        if self.kind == "chat":
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        body |= parameters
        request = json.dumps([self.base_url, self.kind, body], sort_keys=True)
        key = hashlib.sha256(request.encode()).hexdigest()
        if key not in self._answers:
            self._answers[key] = await self._server.ask(self.kind, body, self._read)
            if self._cache:
                self._cache.append({"key": key, **self._answers[key]})
        return self._answers[key]

    def _read(self, answer: Any) -> Reply:
        """The text and the probabilities of yes and no in a server's answer."""
        choice = answer["choices"][0]
        text = (choice["message"]["content"] if self.kind == "chat" else choice["text"]) or ""
        logprobs = choice.get("logprobs") or {}
        if logprobs.get("content"):  # the chat form, which some servers use for both endpoints
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
                    # the word with and without a space before it
                    found[word] = found.get(word, 0.0) + probability
        # raises TypeError for a content that is no text; the server's answer is then no completion
        return {"text": text + "", "top": top if any(places) else None}

    def close(self) -> None:
        if self._cache:
            self._cache.close()

    def __str__(self) -> str:
        endpoint = "chat" if self.kind == "chat" else "completions"
        return f"{self.base_url}: model {self.model}, {endpoint}"


# One row of the cache; "top" is missing if the server gives no log-probs:   {"key": "<SHA-256 of
# URL, endpoint and request>", "text": " Yes", "top": [{"Yes": 0.91, "No": 0.08}]}
def _is_answer(row: dict) -> bool:
    tops = row.get("top") or []
    return (
        all(isinstance(row.get(name), str) for name in ("key", "text"))
        and isinstance(tops, list)
        and all(isinstance(top, dict) for top in tops)
        and all(isinstance(share, float | int) for top in tops for share in top.values())
    )


def _open_cache(path: str | Path | None) -> AppendedRows | None:
    """The answers of earlier runs. Raises UserError if the file cannot be written."""
    try:
        return None if path is None else AppendedRows(path, _is_answer)
    except OSError as error:
        reason = f"cannot be written ({error.strerror}): give another --judge_cache"
        raise UserError(f"cache {path} {reason}") from None
