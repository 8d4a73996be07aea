"""The step judge on any OpenAI-compatible server (lm/openai_client.py).

It asks the same question as the other judges. The score of a step is P(yes) / (P(yes) + P(no)) from
the log-probs in the server's answer, at the place where the answer says yes or no
(reward_model/verdicts.py). A server without log-probs (it ignores or refuses the parameter) is
asked for several sampled verdicts instead, and the score is the share of yes among the verdicts
that are a yes or a no. Every answer is appended to a cache file when it arrives, so that a killed
run pays for no answer twice.
"""

import asyncio
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import JudgeError, UserError, short
from common.resumable import AppendedRows
from common.terminal import printable
from lm.openai_client import NoLogprobs, OpenAIServer, TooLong, gather
from reward_model.protocols import Scores, Solution, StepJudge, check_positive, with_skip
from reward_model.templates import CHAT, PLAIN, named_template
from reward_model.verdicts import find_verdict, p_yes, spelling

# tokens of an answer: most models answer at once; one that thinks or explains first is asked again
SHORT, LONG = 8, 2048
LEAST = 4  # if the context has no room for more
# the most log-probs that OpenAI's own endpoints give
TOP = {"chat": {"logprobs": True, "top_logprobs": 20}, "text": {"logprobs": 5}}
# how vocabularies write spaces and newlines
VOCABULARY_SPACES = str.maketrans("▁ĠĊ", "  \n")

Question = tuple[str, tuple[str, ...]]  # (prompt, steps): is the last of them right?
# {"text": the answer, "top": its Places (reward_model/verdicts.py) as lists, None without
# log-probs, "cut": it was as long as it may be}
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
        timeout: float = 300.0,
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
        self._gives = "gives no logprobs"  # the reason, if it does not
        self._is_slow = False  # it needs LONG answers: known when one had a verdict
        self._cache = _open_cache(cache)
        self._answers: dict[str, Reply] = {}  # by the hash of the request
        for row in self._cache.rows if self._cache else ():
            self._answers[row["key"]] = {name: row.get(name) for name in ("text", "top", "cut")}

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
        if not self.can_read(prompt, steps):
            return None
        lines = "".join(f"{step}\n" for step in steps)
        text = self.template.before.replace("{prompt}", prompt) + lines + self.template.question
        try:
            score = None if self._gives_logprobs is False else await self._from_logprobs(text)
            return round(await self._from_verdicts(text) if score is None else score, 6)
        except TooLong:
            return None

    async def _from_logprobs(self, text: str) -> float | None:
        """The score at the place of the verdict; None if the answer has no such place."""
        try:
            reply = await self._answer(text, {"temperature": 0, **TOP[self.kind]})
        except NoLogprobs as refusal:
            self._has_no_logprobs(str(refusal))
            return None
        if reply["top"] is not None:
            self._gives_logprobs = True
            return p_yes(reply["text"], reply["top"])
        if self._gives_logprobs is None and reply["text"].strip():
            self._has_no_logprobs(self._gives)
        return None

    def _has_no_logprobs(self, reason: str) -> None:
        if self._gives_logprobs is not False:
            self._gives_logprobs = False
            instead = f"the share of yes among {self.samples} sampled verdicts"
            print(printable(f"{self._server} {reason}: a score is {instead}"))

    async def _from_verdicts(self, text: str) -> float:
        """The share of yes among the sampled verdicts that are a yes or a no. Each verdict is one
        request, since some servers ignore `n`."""
        bodies = [{"temperature": 1, "seed": seed} for seed in range(self.samples)]
        replies = await gather([self._answer(text, body) for body in bodies])
        found = [find_verdict(reply["text"]) for reply in replies]
        verdicts = [verdict.is_yes for verdict in found if verdict]
        if not verdicts:
            count = [reply["cut"] for reply in replies].count(True) if self._may_be_long else 0
            cut = f" ({count} answers were cut at {LONG} tokens)" if count else ""
            hint = " or, for a base model, a judge template such as plain"
            raise JudgeError(
                f"{self._server}: {self.model} was asked for Yes or No {self.samples} times and "
                f"answered neither, but {short(replies[0]['text'])}{cut}: "
                f"take another model{hint if self.kind == 'chat' else ''}"
            )
        return sum(verdicts) / len(verdicts)

    # --- requests

    @property
    def _may_be_long(self) -> bool:
        """Whether an answer may be a text. Behind the plain template it is one line."""
        return self.template.question != PLAIN.question

    async def _answer(self, text: str, parameters: dict) -> Reply:
        """The answer to a question, with room for a text if a short one holds no verdict."""
        long = self._body(text, parameters, LONG)
        if not (self._may_be_long and (self._is_slow or self._key(long) in self._answers)):
            reply = await self._ask(self._body(text, parameters, SHORT), LEAST)
            verdict = find_verdict(reply["text"])
            if not (reply["cut"] and self._may_be_long) or (verdict and verdict.leads):
                return reply
        try:
            reply = await self._ask(long, SHORT)
        except TooLong:
            return await self._ask(self._body(text, parameters, SHORT), LEAST)
        self._is_slow = self._is_slow or find_verdict(reply["text"]) is not None
        return reply

    def _body(self, text: str, parameters: dict, tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "max_tokens": tokens}
        if self.kind == "chat":
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        return body | parameters

    def _key(self, body: dict[str, Any]) -> str:
        request = json.dumps([self.base_url, self.kind, body], sort_keys=True)
        return hashlib.sha256(request.encode()).hexdigest()

    async def _ask(self, body: dict[str, Any], least: int) -> Reply:
        """The answer to one request, from the cache or else from the server."""
        key = self._key(body)
        if key not in self._answers:
            self._answers[key] = await self._server.ask(self.kind, body, self._read, least)
            if self._cache:
                self._cache.append({"key": key, **self._answers[key]})
        return self._answers[key]

    def _read(self, answer: Any) -> Reply:
        """The text of a server's answer, and the probabilities of yes and no in it."""
        choice = answer["choices"][0]
        text = choice["message"]["content"] if self.kind == "chat" else choice["text"]
        text = self._server.own_text("" if text is None else text)
        tokens = _tokens(choice, answer)
        start = 0
        if tokens and text.strip():
            # the tokens may hold a block of reasoning that is not part of the text
            whole = self._server.own_text("".join(token for token, _ in tokens))
            if text.strip() not in whole:  # some servers give tokens as their vocabulary has them
                whole = whole.translate(VOCABULARY_SPACES)
            start = max(0, whole.rfind(text.strip()))
            text = whole[start:]
        if not self._may_be_long:
            text = text[: len(text) - len(text.lstrip())] + text.lstrip().partition("\n")[0]
        top, place = [], -start
        for token, listed in tokens:
            first, place = place, place + len(token)
            found: dict[str, float] = {}
            for word, probability in listed:
                letters = spelling(word)
                if letters:  # the word with and without a space, in small and capital letters
                    found[letters] = found.get(letters, 0.0) + probability
            if found and place > 0 and first < len(text):
                top.append([first, place, {word: round(p, 9) for word, p in found.items()}])
        # the word behind the chosen one counts: without it every score would be 0 or 1
        is_listed = any(len(listed) > 1 or listed[0][1] > 0.95 for _, listed in tokens if listed)
        if choice.get("logprobs") and not is_listed:
            self._gives = "gives logprobs of the chosen token only"
        cut = str(choice.get("finish_reason")).lower() in ("length", "max_tokens")
        return {"text": text, "top": top if is_listed else None, "cut": cut}

    def close(self) -> None:
        if self._cache:
            self._cache.close()

    def __str__(self) -> str:
        endpoint = "chat" if self.kind == "chat" else "completions"
        return f"{self.base_url}: model {self.model}, {endpoint}"


def _tokens(choice: dict, answer: dict) -> list[tuple[str, list[tuple[str, float]]]]:
    """Every token of an answer with the listed (token, probability) at its place.

    Of the chat form, which some servers use for both endpoints; of the form of /v1/completions; of
    llama.cpp's own. An answer without log-probs has none."""
    logprobs = choice.get("logprobs") or {}
    places = logprobs.get("content") or answer.get("completion_probabilities")
    if places:
        return [_listed(place) for place in places]
    tops = logprobs.get("top_logprobs") or []
    if not tops:
        return []
    chosen = logprobs.get("tokens") or [max(top, key=top.get) if top else "" for top in tops]
    own = logprobs.get("token_logprobs") or [None] * len(chosen)
    found = []
    for token, logprob, top in zip(chosen, own, tops, strict=True):
        listed = {token: logprob, **(top or {})}
        found.append((token, [(word, _p(value)) for word, value in listed.items()]))
    return found


def _listed(place: dict) -> tuple[str, list[tuple[str, float]]]:
    """The token and the listed probabilities of one place in the chat form."""
    if "probs" in place:  # llama.cpp before 2025
        return place["content"], [(top["tok_str"], float(top["prob"])) for top in place["probs"]]
    rows = place.get("top_logprobs") or place.get("top_probs") or []
    if all(row["token"] != place["token"] for row in rows):
        rows = [place, *rows]
    return place["token"], [
        (row["token"], float(row["prob"]) if "prob" in row else _p(row.get("logprob")))
        for row in rows
    ]


def _p(logprob: float | None) -> float:
    """The probability; 0 for a log-prob that is missing or NaN."""
    if logprob is None or math.isnan(logprob):
        return 0.0
    return math.exp(min(logprob, 0.0))


# One row of the cache; "top" is missing if the server gives no log-probs. Offsets are letters.
#   {"key": "<SHA-256 of URL, endpoint and request>", "text": "**Yes**",
#    "top": [[2, 5, {"yes": 0.91, "no": 0.08}]], "cut": false}
def _is_kept(row: dict) -> bool:
    """Whether a row of the cache is one that this judge wrote: other rows are asked for again."""
    top = row.get("top")
    places = [] if top is None else top
    return (
        isinstance(row.get("key"), str)
        and isinstance(row.get("text"), str)
        and isinstance(row.get("cut"), bool)
        and isinstance(places, list)
        and all(_is_place(place) for place in places)
    )


def _is_place(place: Any) -> bool:
    if not (isinstance(place, list) and len(place) == 3 and isinstance(place[2], dict)):
        return False
    first, last, listed = place
    return type(first) is type(last) is int and all(
        type(p) in (int, float) and 0 <= p <= 1.000001 for p in listed.values()
    )


def _open_cache(path: str | Path | None) -> AppendedRows | None:
    """The answers of earlier runs. Raises UserError if the file cannot be written."""
    try:
        return None if path is None else AppendedRows(path, _is_kept)
    except OSError as error:
        reason = f"cannot be written ({error.strerror}): give another --judge_cache"
        raise UserError(f"cache {path} {reason}") from None
