"""What a model's chat template writes around the texts of a conversation.

A chat template is a program (Jinja) that comes with the model. It runs in a sandbox, in a process
of its own with limits on time and memory. It is given marks in place of the texts, once for each
kind of conversation; the texts are put in afterwards. So no text of a user can steer it.

Where a model is to answer, thinking is turned off, by whatever switch the template has: an answer
or a verdict is read right after the prompt. A template that makes the model think all the same is
refused. Only a policy whose thoughts are kept or cut (`--thinking`) may think."""

import datetime
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.errors import ModelError, short
from lm.prompting import is_chat
from lm.thinking import CLOSE, OPEN, last_end

SECONDS = 5  # of CPU time, for all conversations of one call
WAIT = 60  # seconds of wall-clock time
MEMORY = 512 * 2**20  # bytes of address space
MAX_CHARACTERS = 10**6  # of a template, and of the text that it renders
# A template that asks for the date gets this one, else scores would depend on the day. LLaMA's own
# templates fall back to it.
TODAY = datetime.datetime(2024, 7, 26)

# The variables by which templates turn thinking off: Qwen3, SmolLM3, GLM; DeepSeek-V3, Granite,
# Kimi; Command A; Seed-OSS
OFF = {"enable_thinking": False, "thinking": False, "reasoning": False, "thinking_budget": 0}
ON = {"enable_thinking": True, "thinking": True, "reasoning": True}
# Further ways, for a template that names them: a pattern in it, variables, a system message
SWITCHES: list[tuple[str, dict[str, Any], str]] = [
    ("/no_think", {}, "/no_think"),
    ("detailed thinking", {}, "detailed thinking off"),
    (r"reasoning_effort[^%}]{0,99}[\"']none[\"']", {"reasoning_effort": "none"}, ""),
]
# around a text, to see what a template strips from it
LEFT, RIGHT = "\n \n", "\n\t\n"
STRIPPED = ("", "\n", None)  # arguments of str.strip: nothing, line breaks, white space


@dataclass(frozen=True)
class ChatFrame:
    """The pieces of text around and between the N texts of a conversation.

    pieces: N + 1 texts. strips: for every text what the template strips from its start and its
    end, as arguments of str.lstrip and str.rstrip. thinking_off: whether the template has a way to
    turn thinking off, which is used."""

    pieces: tuple[str, ...]
    strips: tuple[tuple[str | None, str | None], ...]
    thinking_off: bool = False

    def fill(self, *texts: str) -> str:
        """The whole text of the conversation."""
        parts = [self.pieces[0]]
        for text, (left, right), piece in zip(texts, self.strips, self.pieces[1:], strict=True):
            parts += [text.lstrip(left).rstrip(right), piece]
        return "".join(parts)


def tokenizer_frame(
    tokenizer: Any, roles: tuple[str, ...] = (), has_system: bool = False, thinks: bool = False
) -> ChatFrame:
    """`chat_frame` of a tokenizer with a chat template.

    Raises ModelError if the template cannot be used."""
    try:
        template = default_template(tokenizer.chat_template)
        return chat_frame(template, tokenizer.special_tokens_map, roles, has_system, thinks)
    except ValueError as error:
        raise ModelError(
            f"{tokenizer.name_or_path}: its chat template cannot be used: {error}"
        ) from None


def default_template(template: str | Mapping[str, Any]) -> str:
    """The chat template of a model; of several, by name, the one named default.

    Raises ValueError."""
    if isinstance(template, Mapping):
        if "default" not in template:
            raise ValueError(f"none of {', '.join(sorted(template))} is named default")
        template = template["default"]
    if not isinstance(template, str):
        raise ValueError("it is no text")
    return template


def render_chat(tokenizer: Any, turns: Sequence[tuple[str, str]]) -> str:
    """The text of a finished conversation, given as (role, text). Raises ModelError."""
    roles, texts = zip(*turns, strict=True)
    return tokenizer_frame(tokenizer, roles).fill(*texts)


def begins_thought(text: str) -> bool:
    """Whether a model's text begins with a mark that opens its thoughts, or with the first token of
    one."""
    text = text.strip()
    return bool(OPEN.match(text)) or text in ("<", "<think", "<|channel|>")


def check_answer(tokenizer: Any, text: str) -> None:
    """Raises ModelError if a chat model's answer begins with its thoughts, which are no steps.

    A template that turns thinking off is trusted."""
    if not is_chat(tokenizer) or not OPEN.match(text.lstrip()):
        return
    if not tokenizer_frame(tokenizer).thinking_off:
        raise ModelError(
            f"{tokenizer.name_or_path}: the model thinks before it answers ({short(text)}), and its"
            " chat template has no known way to turn that off: use a model that does not think"
        )


def chat_frame(
    template: str,
    tokens: Mapping[str, Any] | None = None,
    roles: tuple[str, ...] = (),
    has_system: bool = False,
    thinks: bool = False,
) -> ChatFrame:
    """The frame of a finished conversation between these roles.

    Without roles: of a user's message and the beginning of the answer, with thinking turned off.
    has_system: a system message stands before it. thinks: thinking is turned on. tokens: the
    special tokens by name (`bos_token` ...). Raises ValueError with the reason if the template
    cannot be used."""
    tokens_text = json.dumps(tokens or {}, default=str)
    return _cached_frame(template, tokens_text, roles, has_system, thinks)


@lru_cache(maxsize=512)
def _cached_frame(
    template: str, tokens: str, roles: tuple[str, ...], has_system: bool, thinks: bool
) -> ChatFrame:
    variables = json.loads(tokens)
    if roles:
        return _frame(template, variables, roles)[0]
    roles = ("system", "user") if has_system else ("user",)
    try:
        if thinks:
            more = {**ON, "add_generation_prompt": True}
            return _frame(template, {**variables, **more}, roles)[0]
        frames = list(_answer_frames(template, variables, roles))
    except ValueError as error:
        if has_system and not _refuses(template, variables):
            raise ValueError(f"it takes no system message ({error})") from None
        raise
    if not frames:
        raise ValueError(
            "it makes the model think before it answers, and has no known way to turn that off"
        )
    return next((frame for frame in frames if frame.thinking_off), frames[0])


def _refuses(template: str, variables: dict[str, Any]) -> bool:
    """Whether a template cannot be used even for a user's message alone."""
    try:
        _frame(template, {**variables, "add_generation_prompt": True}, ("user",))
    except ValueError:
        return True
    return False


def _answer_frames(
    template: str, variables: dict[str, Any], roles: tuple[str, ...]
) -> Iterator[ChatFrame]:
    """The frames of a prompt for an answer in which the model does not begin to think.

    One for every switch that the template names, up to the first that is seen to work. Raises
    ValueError if the template cannot be used at all."""
    for pattern, more, system in [("", {}, ""), *SWITCHES]:
        if not re.search(pattern, template):
            continue
        try:
            frame, (thinking, answered) = _frame(
                template,
                {**variables, **OFF, **more, "add_generation_prompt": True},
                roles,
                system,
                [(ON, ()), ({"add_generation_prompt": False}, ("assistant",))],
            )
        except ValueError:
            if not pattern:
                raise
            continue  # it refuses a system message
        *before, after = frame.pieces
        is_closed = bool(CLOSE.search(after))
        if is_closed or OPEN.search(after):
            thinks = last_end(OPEN, after) > last_end(CLOSE, after)
        else:
            thinks = bool(OPEN.search("".join(before))) or "<|channel|>analysis" in template
        if thinks:
            continue
        # what it writes before an answer, if it leaves some of that to the model
        header = answered[len(roles)] if answered else ""
        rest = header.removeprefix(after)
        if rest != header and rest.strip() and not (OPEN.search(rest) or CLOSE.search(rest)):
            frame = replace(frame, pieces=(*before, header))
        is_switched = thinking is not None and thinking != [*before, after]
        yield replace(frame, thinking_off=bool(pattern) or is_closed or is_switched)
        if is_closed or is_switched:
            return


def _frame(
    template: str,
    variables: dict[str, Any],
    roles: tuple[str, ...],
    system: str = "",
    others: Sequence[tuple[dict[str, Any], tuple[str, ...]]] = (),
) -> tuple[ChatFrame, list[list[str] | None]]:
    """The frame of messages of these roles, after a system message with the text `system`, which
    stands in front of the first message if that is one of the system's.

    others: (more variables, more roles) of further conversations, whose pieces are returned too, or
    None for one that fails. Raises ValueError if the frame itself fails."""

    def conversation(
        as_list: bool,
        pads: tuple[str, str] = ("", ""),
        more: Mapping[str, Any] = variables,
        added: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        texts = [pads[0] + _mark(k) + pads[1] for k in range(len(roles) + len(added))]
        turns = list(zip((*roles, *added), texts, strict=True))
        if system and roles[0] == "system":
            turns[0] = ("system", f"{system}\n\n{texts[0]}")
        elif system:
            turns.insert(0, ("system", system))
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if as_list else text}
            for role, text in turns
        ]
        return {**variables, **more, "messages": messages}

    # templates of models with images may need a list of parts
    conversations = [
        [
            conversation(as_list),
            conversation(as_list, (LEFT, RIGHT)),
            *(conversation(as_list, more=more, added=added) for more, added in others),
        ]
        for as_list in (False, True)
    ]
    rendered = iter(_render(template, list(itertools.chain(*conversations))))
    reasons = []
    for shape in conversations:
        plain, wide, *more = [next(rendered) for _ in shape]
        try:
            pieces = _split(plain, len(roles))
            frame = ChatFrame(tuple(pieces), _strips(pieces, _split(wide, len(roles))))
        except ValueError as error:
            reasons.append(str(error))
            continue
        found: list[list[str] | None] = []
        for text, (_, added) in zip(more, others, strict=True):
            try:
                found.append(_split(text, len(roles) + len(added)))
            except ValueError:
                found.append(None)
        return frame, found
    raise ValueError(reasons[0])


def _mark(k: int) -> str:
    """A text that shows whether a template changes texts: with signs that HTML and JSON escape,
    capital letters and line breaks."""
    return f"aB{k} <&>\"'\\ é\n\n  yZ{k}."


def _split(rendered: "Rendered", count: int) -> list[str]:
    """The text before, between and after the first `count` marks. Raises ValueError."""
    rest, error = rendered
    if rest is None:
        raise ValueError(error)
    pieces = []
    for mark in map(_mark, range(count)):
        piece, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise ValueError("it does not write every message once and as it is")
        pieces.append(piece)
    return [*pieces, rest]


def _strips(pieces: list[str], padded: list[str]) -> tuple[tuple[str | None, str | None], ...]:
    """What a template strips from texts, from the pieces around texts without and with white space.

    Raises ValueError if it changes their white space in another way."""
    found: list[tuple[str | None, str | None]] = []
    for k, (piece, wide) in enumerate(zip(pieces, padded, strict=True)):
        # at a piece: the end of the text before it and the start of the text after it
        ends = STRIPPED if k else ("",)
        starts = STRIPPED if k < len(pieces) - 1 else ("",)
        right, left = (RIGHT if k else ""), (LEFT if k < len(pieces) - 1 else "")
        matches = [
            (end, start)
            for end in ends
            for start in starts
            if right.rstrip(end) + piece + left.lstrip(start) == wide
        ]
        if not matches:
            raise ValueError("it changes the white space in a message")
        found.append(matches[0])
    return tuple((found[k][1], found[k + 1][0]) for k in range(len(found) - 1))


# --- running a template ---

Rendered = tuple[str | None, str]  # (text, "") or (None, reason)


def _render(template: str, conversations: list[dict[str, Any]]) -> list[Rendered]:
    """What a template writes for every conversation. Raises ValueError if it exceeds a limit."""
    if len(template) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(template)} characters, at most {MAX_CHARACTERS} are read")
    root = str(Path(__file__).resolve().parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); import {__name__} as it; it._serve()"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            input=json.dumps([template, conversations]).encode(),
            capture_output=True,
            timeout=WAIT,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"it takes longer than {WAIT} seconds") from None
    if done.returncode > 0:
        *_, last = done.stderr.decode(errors="replace").splitlines() or [""]
        raise ValueError(f"it cannot be run: {short(last)}")
    if done.returncode:
        limits = f"{SECONDS} seconds or {MEMORY >> 20} MB of memory"
        raise ValueError(f"it needs more than {limits}, or crashes ({done.returncode})")
    return [(text, reason) for text, reason in json.loads(done.stdout)]


def _serve() -> None:
    """Render the conversations on stdin, under limits. Runs in a process of its own."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":  # elsewhere it cannot be set below what is in use
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    template, conversations = json.load(sys.stdin)
    compiled, rendered = lru_cache(_environment().from_string), []
    for conversation in conversations:
        try:
            text = compiled(template).render(conversation)
            if len(text) > MAX_CHARACTERS:
                raise ValueError(f"it writes {len(text)} characters")
            text.encode()  # half of a surrogate pair cannot be tokenized
            rendered.append((text, ""))
        except Exception as error:  # a template is a program and can raise anything
            rendered.append((None, f"{type(error).__name__}: {short(str(error))}"))
    print(json.dumps(rendered))


def _environment() -> Any:
    """The sandbox, with what transformers gives to a chat template."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}`, which marks the answers for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class PlainNamespace(Namespace):
        """Holds no name that Python gives a meaning."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"no name in a namespace begins with an underscore: {name}")
            super().__setitem__(name, value)

    def namespace(*args: Any, **values: Any) -> PlainNamespace:
        made = PlainNamespace()
        for name, value in dict(*args, **values).items():
            made[name] = value
        return made

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)  # fmt: skip  # noqa: E501

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": TODAY.strftime,
        "dict": lambda *args, **values: dict(*args, **values),
        "namespace": namespace,
    }
    return environment
