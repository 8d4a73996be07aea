"""The prompt of a row of a data set: a text, parts of a text, or a conversation."""

import re
from typing import Any

from common.errors import RecordError
from reasoning.datasets.files import show
from reasoning.datasets.row_fields import is_empty, text_of
from reasoning.steps import one_line

# columns that hold a prompt, those that hold a part of one, and those that hold a conversation
PROMPTS = ("prompt", "question", "problem", "query", "instruction")
PARTS = ("input", "body", "context", "passage")
SYSTEM = ("system", "system_prompt", "system_message")
_CONVERSATIONS = ("prompt", "context", "messages", "conversations", "conversation")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}

Turns = list[tuple[str, str]]  # (role, text)


def question_of(row: dict) -> str:
    """The prompt of a row with one question. Raises RecordError."""
    turns = context_of(row)
    prompt = prompt_of(turns) if turns else None
    if prompt is None:
        raise RecordError("field 'prompt': expected one question, as a text or as messages")
    return prompt


def _column_prompt(row: dict) -> str | None:
    """The text of the columns that hold the prompt, or None. `prompt` is always the whole prompt.

    Raises RecordError if several columns may hold a part of it, so that none is lost."""

    def texts_of(*names: str) -> dict[str, str]:
        kinds = (str, int, float)
        values = {name: dict.get(row, name) for name in names}
        filled = [name for name, value in values.items() if isinstance(value, kinds)]
        return {name: text_of(row, name) for name in filled if not is_empty(values[name])}

    texts = texts_of("prompt") or texts_of(*PROMPTS, *PARTS)
    if {"instruction", "input"} <= texts.keys():  # Alpaca
        texts["instruction"] += "\n" + texts.pop("input")
    if {"question", "body"} <= texts.keys():  # SVAMP, where a body may end without a mark
        body = texts.pop("body")
        texts["question"] = f"{body}{'' if body[-1] in '.,;:?!' else ','} {texts['question']}"
    if not texts:
        return None
    longest = max(texts.values(), key=len)
    if any(one_line(text) not in one_line(longest) for text in texts.values()):
        names = "' and '".join(texts)
        raise RecordError(f"columns '{names}' may be parts of the prompt; join them as 'prompt'")
    return longest


def turns_of(value: Any, name: str) -> Turns | None:
    """The turns of a conversation: messages with role and content (or from and value), one such
    message, or a text `Human: ... Assistant: ...`. None for any other text."""
    if isinstance(value, str):
        _, *parts = re.split(r"(?:^|\n\n)\s*(Human|Assistant):", value)
        if not value.lstrip().startswith("Human:") or "Assistant" not in parts[::2]:
            return None
        roles = [_ROLES.get(part.lower(), "assistant") for part in parts[::2]]
        return list(zip(roles, map(str.strip, parts[1::2]), strict=True))
    turns: Turns = []
    messages: list[Any] = value if isinstance(value, list) else [value]
    for message in messages:
        role, content = None, None
        if isinstance(message, dict):
            role = message.get("role", message.get("from", message.get("source")))
            content = next((message[k] or "" for k in ("content", "value") if k in message), None)
        if isinstance(content, list):
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "".join(text for text in texts if isinstance(text, str))
        if not isinstance(content, str) or not isinstance(role, str):
            expected = "a text or messages with role and content"
            raise RecordError(f"field '{name}': expected {expected}, got {show(value)}")
        turns.append((_ROLES.get(role.lower(), role.lower()), content))
    return turns


def context_of(row: dict) -> Turns | None:
    """The turns before the answer, from the columns of a row; None if no column has them."""
    turns: Turns | None = None
    if not isinstance(row.get("prompt"), list | dict):
        text = _column_prompt(row)
        if text is not None:
            turns = turns_of(text, "prompt") or [("user", text)]
    for name in _CONVERSATIONS if turns is None else ():
        if isinstance(row.get(name), list | dict) and row[name]:
            turns = turns_of(row[name], name)
            break
    if turns and turns[-1][0] == "assistant":  # the answer, or the empty start of one
        turns = turns[:-1]
    system = next((row[name] for name in SYSTEM if not is_empty(row.get(name))), None)
    if turns and isinstance(system, str) and turns[0][0] != "system":
        turns = [("system", system.strip()), *turns]
    if turns and not is_empty(row.get("history")):
        turns = [*turns, ("user", "")]  # earlier turns in a column of their own
    return turns


def prompt_of(turns: Turns) -> str | None:
    """The prompt of a conversation with one question, the system message first; otherwise None."""
    turns = [(role, text.strip()) for role, text in turns if role != "system" or text.strip()]
    if [role for role, _ in turns] not in (["user"], ["system", "user"]):
        return None
    return text_of({"prompt": "\n\n".join(text for _, text in turns)}, "prompt")
