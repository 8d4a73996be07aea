"""How to ask again when a server refuses one parameter of a request.

Servers differ in the parameters that they know, in their names and in their limits, and say so in
an error of many wordings. A change is worked out from the error's words and the request's own
values: another name, a lower or higher number, another form of the log-probs, or no such parameter.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]

# what other servers call a parameter of ours
ALIASES = {
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "top_n_tokens": "top_logprobs",
    "n_probs": "top_logprobs",
    "num_logprobs": "top_logprobs",
    "max_logprobs": "top_logprobs",
    "logprob": "logprobs",
    "log_probs": "logprobs",
    "log-probs": "logprobs",
    "log probs": "logprobs",
    "log probabilities": "logprobs",
}
LOGPROBS = ("logprobs", "top_logprobs")
LENGTHS = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
OPTIONAL = ("temperature", "top_p", "seed", "stop")
# the numbers of log-probs to try if the server names no limit
FEWER = (10, 5, 3, 2)

_NUMBER = re.compile(r"(?<![\w.-])\d{1,9}(?!\w|\.\d|-\w)")
_AT_MOST = re.compile(
    r"at most|maxim|\bmax\b|less than|exceed|greater than|more than|between|limit|too (large|many"
    r"|high|big)|range|<=?|≤|up to|above|larger|smaller than or equal",
    re.I,
)
_AT_LEAST = re.compile(r"at least|minim|\bmin\b|greater than|>=?|≥|too (small|low)|below", re.I)
_UNKNOWN = re.compile(
    r"not (be )?(supported|allowed|permitted|available|enabled|implemented|compatible|accept)"
    r"|unsupported|(does|do) ?(not|n't) (support|accept|allow)|disabled|un(known|recogni[sz]ed"
    r"|expected)|cannot|can't|no support",
    re.I,
)
_AN_INTEGER = re.compile(r"\bint|integer|number|\b[iu](8|16|32|64)\b|usize", re.I)
_A_FLAG = re.compile(r"bool", re.I)


@dataclass(frozen=True)
class Change:
    """A change to the bodies of requests; `words` tell a person what it does. `gives_up`: without
    log-probs the request is of no use."""

    words: str
    apply: Callable[[Body], Body]
    gives_up: bool = False


def remedy(body: Body, words: str, parameter: str | None) -> Change | None:
    """The change after which a server may accept a body that it refused with these words.

    parameter: what the error names as refused, if it does so in a field of its own. None if the
    words name no parameter that can be changed."""
    name = _refused(body, words, parameter)
    if name in LOGPROBS:
        return _logprobs(body, words, name)
    if name in LENGTHS:
        return _length(body, words, name)
    if name is None:
        return None
    return Change(f"refuses {name}, which is left out", lambda old: _without(old, name))


def _refused(body: Body, words: str, parameter: str | None) -> str | None:
    """The parameter that is refused: the named one, else the first that the words mention."""
    changeable = [name for name in body if name in (*LOGPROBS, *LENGTHS, *OPTIONAL)]
    ours = {name: name for name in changeable} | {
        alias: name
        for alias, name in ALIASES.items()
        if name in changeable or (name in LOGPROBS and "logprobs" in changeable)
    }
    if parameter is not None:
        return ours.get(parameter)
    places = []
    for spelling, name in ours.items():
        found = re.search(rf"(?<![\w-]){re.escape(spelling)}(?![\w-])", words, re.I)
        if found:
            places.append((found.start(), name))
    return min(places)[1] if places else None


def _length(body: Body, words: str, name: str) -> Change | None:
    """Fewer or more tokens if the words have a limit, else the parameter's other name."""
    value = body[name]
    bound = _bound(value, words)
    if bound is not None:
        nearer, side = (min, "at most") if bound < value else (max, "at least")

        def bounded(old: Body) -> Body:
            return old | {name: nearer(old[name], bound)} if name in old else old

        return Change(f"takes {side} {bound} as {name}", bounded)
    if name != "max_tokens":  # it was renamed before
        return None
    other = LENGTHS[name]

    def renamed(old: Body) -> Body:
        return {other if key == name else key: value for key, value in old.items()}

    return Change(f"refuses {name}: {other} is sent instead", renamed)


def _logprobs(body: Body, words: str, name: str) -> Change:
    """Fewer log-probs, or log-probs in the form of other servers, or none."""
    flag = body["logprobs"]
    count: Any = body.get("top_logprobs", flag)
    if flag is True and name == "logprobs" and _AN_INTEGER.search(words):
        return Change("takes the number of log-probs as logprobs", _as_number)
    if flag is not True and _A_FLAG.search(words):
        return Change("takes the number of log-probs as top_logprobs", _as_flag)
    limit = _bound(count, words, upper_only=True)
    if limit is None and not _UNKNOWN.search(words):
        limit = next((number for number in FEWER if number < count), None)
    if limit is not None and limit >= 2:
        return Change(f"gives {limit} log-probs a token at most", _at_most(limit))
    if limit is None and flag is True and name == "top_logprobs":  # one more form to try
        return Change("takes the number of log-probs as logprobs", _as_number)
    kind = "log-probs of one token only" if limit == 1 else "no logprobs"
    return Change(f"gives {kind}", lambda old: old, gives_up=True)


def _bound(value: Any, words: str, upper_only: bool = False) -> int | None:
    """The limit in the words that the value breaks: the highest number below it, or the lowest
    above it. None if there is none."""
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    numbers = [int(number) for number in _NUMBER.findall(words)]
    lower = [number for number in numbers if 1 <= number < value]
    higher = [number for number in numbers if number > value]
    if lower and (upper_only or _AT_MOST.search(words)):
        return max(lower)
    if higher and not upper_only and _AT_LEAST.search(words):
        return min(higher)
    return None


def _at_most(limit: int) -> Callable[[Body], Body]:
    def fewer(old: Body) -> Body:
        name = "top_logprobs" if "top_logprobs" in old else "logprobs"
        return old | {name: min(old[name], limit)} if name in old else old

    return fewer


def _as_number(old: Body) -> Body:
    if "top_logprobs" not in old:
        return old
    return _without(old, "top_logprobs") | {"logprobs": old["top_logprobs"]}


def _as_flag(old: Body) -> Body:
    if "logprobs" not in old or old["logprobs"] is True:
        return old
    return old | {"logprobs": True, "top_logprobs": old["logprobs"]}


def _without(old: Body, name: str) -> Body:
    return {key: value for key, value in old.items() if key != name}
