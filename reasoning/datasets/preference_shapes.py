"""Conversion of rows of public data sets into preference pairs and groups of ranked responses."""

import re
from collections.abc import Iterator
from typing import Any

from common.errors import RecordError
from reasoning.datasets.files import Dropped
from reasoning.datasets.ranking import RankedGroup
from reasoning.datasets.row_fields import (
    drop_empty,
    field_of,
    fields_of,
    in_one_line,
    is_empty,
    text_of,
)
from reasoning.datasets.row_prompt import (
    PARTS,
    PROMPTS,
    SYSTEM,
    Turns,
    context_of,
    prompt_of,
    turns_of,
)
from reasoning.records import PreferencePair
from reasoning.steps import one_line, shared_prefix, split_text


def has_steps(row: dict) -> bool:
    steps = dict.get(row, "chosen")
    return isinstance(steps, list) and bool(steps) and all(isinstance(step, str) for step in steps)


# --- Step-DPO, TRL and others: preferences ---


def step_dpo_pair(row: dict, dropped: Dropped) -> Iterator[PreferencePair]:
    """One right and one wrong step after the same prefix: scores 1 and 0.

    The published prefix may end with the number of the next step ("... Step 3:"), which then moves
    to both steps."""
    prompt, initial = text_of(row, "prompt"), field_of(row, "initial_reason_steps", str, "a text")
    names = ("chosen", "rejected")
    if drop_empty({name: row.get(name) for name in names}, dropped):
        return
    sides = {side: one_line(text_of(row, side)) for side in names}
    chosen, rejected = sides.values()
    prefix = split_text(initial.replace("Let's think step by step.", "", 1))
    if prefix and re.fullmatch(r"Step\s+\d+\s*:", prefix[-1]):
        marker = prefix.pop()
        chosen, rejected = f"{marker} {chosen}", f"{marker} {rejected}"
    if chosen == rejected:
        dropped["pairs with the same step on both sides"] += 1
        return
    scores: dict[str, Any] = {"chosen_scores": [1.0], "rejected_scores": [0.0]}
    yield PreferencePair(prompt, [chosen], [rejected], prefix, **scores)


def _text_pair(row: dict, dropped: Dropped) -> Iterator[tuple[str, str, str]]:
    """(prompt, chosen, rejected) of a preference, or nothing if it cannot be used.

    The sides are texts or messages; the prompt is in columns of its own, or before the answer in
    both sides. Where messages have it, their turns count."""
    found = _sides(row)
    if drop_empty(found, dropped):
        return
    first, second = (turns_of(side, name) for name, side in found.items())
    context: Turns | None
    if first is None and second is None:
        sides, context = [str(side).strip() for side in found.values()], context_of(row)
        if context is None:
            yield from _guessed_pair(row, sides, dropped)
            return
    elif first is None or second is None:
        raise RecordError(f"field '{next(iter(found))}': expected texts or messages on both sides")
    else:
        if first[:-1] != second[:-1] or {first[-1][0], second[-1][0]} != {"assistant"}:
            dropped["pairs whose sides differ in more than one answer"] += 1
            return
        sides, context = [first[-1][1].strip(), second[-1][1].strip()], first[:-1]
        if not any(role == "user" for role, _ in context):
            context = [*context, *(context_of(row) or [])]
        elif one_line(str(row.get("prompt", ""))) not in ["", *(one_line(t) for _, t in context)]:
            dropped.notes["rows whose 'prompt' is not the user's turn, which is used"] += 1
        if not context:
            raise RecordError(_no_prompt(row))
    prompt = prompt_of(context)
    if prompt is None:
        dropped["prompts of more than one turn"] += 1
        return
    if all(_repeats(side, prompt) for side in sides):
        dropped.notes["rows whose sides begin with the prompt, which is cut off there"] += 1
        sides = [side[len(prompt) :].strip() for side in sides]
    if drop_empty(dict(zip(found, sides, strict=True)), dropped):
        return
    if sides[0] == sides[1]:
        dropped["pairs with the same answer on both sides"] += 1
    else:
        yield prompt, sides[0], sides[1]


def _sides(row: dict) -> dict[str, Any]:
    """The two sides of a preference by the names of their columns. A number becomes a text."""
    names = ("chosen", "rejected") if "chosen" in row else ("chosen_response", "rejected_response")
    if names[0] not in row and "messages" in row:  # ms-swift: the last message is the better answer
        turns = turns_of(row["messages"], "messages") or []
        if [role for role, _ in turns[-1:]] != ["assistant"]:
            raise RecordError("field 'messages': expected an answer as the last message")
        sides = {"messages": turns[-1][1], names[1]: row.get(names[1])}
    else:
        sides = {name: row.get(name) for name in names}
    for name, side in sides.items():
        if not isinstance(side, list | dict) and not is_empty(side):
            sides[name] = text_of({name: side}, name)
    return sides


def _repeats(side: str, prompt: str) -> bool:
    """Whether a side begins with the whole prompt: `2 + 2` does not count in `2 + 2 = 4`."""
    after = side.removeprefix(prompt)
    return after != side and (
        after[:1] in ("", "\n") or (prompt[-1] in ".?!:" and after[:1].isspace())
    )


def _no_prompt(row: dict) -> str:
    """The error for a row without a prompt, with the column that may hold it."""
    known = {"chosen", "rejected", *PROMPTS, *PARTS, *SYSTEM}
    likely = [name for name, value in row.items() if name not in known and _is_prose(value)]
    hint = f"; if it is in '{likely[0]}', rename that column" if likely else ""
    return f"field 'prompt' is missing: expected a text, also as {', '.join(PROMPTS[1:])}{hint}"


def _is_prose(value: Any) -> bool:
    """Whether a value may be a prompt: a text of several words, not a name or a number."""
    return isinstance(value, str) and len(value.split()) > 1


def _guessed_pair(row: dict, sides: list[str], dropped: Dropped) -> Iterator[tuple[str, str, str]]:
    """Both sides begin with the prompt, as in TRL's implicit format; it is cut between words.

    Raises RecordError if a column may hold the prompt."""
    empty = next((name for name in PROMPTS if name in row), None)
    prompt = re.sub(r"\S*\Z", "", sides[0][: shared_prefix(*sides)])
    if empty is not None:
        dropped[f"rows with an empty '{empty}'"] += 1
    elif "rename" in (error := _no_prompt(row)):
        raise RecordError(error)
    elif not prompt.strip():
        dropped["pairs without a common prompt"] += 1
    else:
        dropped.notes["rows without a prompt: guessed, the words with which both sides begin"] += 1
        yield prompt.strip(), sides[0][len(prompt) :], sides[1][len(prompt) :]


def trl_pair(row: dict, dropped: Dropped) -> Iterator[PreferencePair]:
    for prompt, *sides in _text_pair(row, dropped):
        chosen, rejected = map(split_text, sides)
        if not chosen or not rejected or chosen == rejected:
            dropped["pairs with the same steps on both sides"] += 1
        else:
            yield PreferencePair.from_solutions(prompt, chosen, rejected)


def group_of(row: dict, dropped: Dropped) -> Iterator[RankedGroup]:
    """A ranked group, or a pair as a group of two whole answers. Raises RecordError."""
    if not is_empty(row.get("answers")) and not is_empty(row.get("ranks")):
        yield RankedGroup.from_row({name: row.get(name) for name in ("prompt", "answers", "ranks")})
    elif "initial_reason_steps" in row or has_steps(row):
        convert = own_pair if has_steps(row) else step_dpo_pair
        for pair in convert(row, dropped):
            sides = (pair.chosen, pair.rejected)
            answers = ["\n".join([*pair.prefix, *side]) for side in sides]
            yield RankedGroup(pair.prompt, answers, [1, 2])
    else:
        for prompt, *answers in _text_pair(row, dropped):
            group = {"prompt": prompt, "answers": answers, "ranks": [1, 2]}
            yield RankedGroup.from_row(group)


def own_pair(row: dict, dropped: Dropped) -> Iterator[PreferencePair]:
    yield in_one_line(PreferencePair.from_row(fields_of(row, PreferencePair)))
