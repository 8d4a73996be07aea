"""How a policy is asked, how its tokens are drawn, and how its text becomes steps.

System prompt and prompt template belong to a model: they lie in its tokenizer, beside its chat
template, and are saved with it (`policy_prompts` in tokenizer_config.json). So a model that was
trained with them is asked with them ever after. All else belongs to a run.
"""

import json
from dataclasses import dataclass
from string import Template
from typing import Any

from common.errors import ModelError, UserError
from reasoning.steps import NEWLINE, StepSeparator

KEY = "policy_prompts"
FIELD = "{prompt}"
PLAIN_TEMPLATE = "Problem: {prompt}\nSolution:\n"
# The chat template of a model that knows no chat. Other programs, which send messages, so give it
# the same tokens as this repository does.
PLAIN_CHAT = """{#- one message of a user in a plain template, and its answer -#}
{%- set roles = messages | map(attribute="role") | join(" ") -%}
{%- if roles not in ("user", "user assistant") -%}
{{- raise_exception("this model takes one message of a user, and its answer") -}}
{%- endif -%}
{{- bos_token ~ $before ~ messages[0]["content"] ~ $after -}}
{%- if messages | length == 2 -%}
{{- messages[1]["content"] ~ eos_token -}}
{%- endif -%}
"""
THINKING = ("off", "keep", "cut")


@dataclass(frozen=True)
class Prompts:
    """What stands around a user's prompt.

    system_prompt: a system message before it. prompt_template: a text with `{prompt}`; it replaces
    the instruction in a chat model's message, and the whole plain template of any other model."""

    system_prompt: str | None = None
    prompt_template: str | None = None

    def __post_init__(self) -> None:
        for value in (self.system_prompt, self.prompt_template):
            if not isinstance(value, str | None):
                raise ValueError("expected texts")
        if self.prompt_template is not None and self.prompt_template.count(FIELD) != 1:
            raise ValueError(f"expected {FIELD} once in the template")

    def fill(self, otherwise: str, prompt: str) -> str:
        """The template with the prompt; `otherwise`: the template if there is none."""
        template = otherwise if self.prompt_template is None else self.prompt_template
        return template.replace(FIELD, prompt)


@dataclass(frozen=True)
class Style:
    """The settings of a run.

    top_k: only the TOP_K likeliest tokens are drawn; 0: all. top_p: of these only the likeliest
    that together reach this probability. separator: what ends a step. thinking: `off`, or the
    thoughts of a model that thinks first are its first steps (`keep`) or left out (`cut`).
    prompts: replace those of the model, where they are given."""

    top_p: float = 1.0
    top_k: int = 0
    separator: StepSeparator = NEWLINE
    thinking: str = "off"
    prompts: Prompts = Prompts()

    @property
    def cuts_thoughts(self) -> bool:
        return self.thinking == "cut"

    @property
    def thinks(self) -> bool:
        return self.thinking != "off"

    @property
    def has_plain_steps(self) -> bool:
        """Whether a step is a line of the text, from its start on."""
        return self.separator == NEWLINE and not self.cuts_thoughts


USUAL = Style()


def is_chat(tokenizer: Any) -> bool:
    """Whether a model is asked in its chat template: it has one, and not `plain_chat_template`."""
    template = getattr(tokenizer, "chat_template", None)
    return bool(template) and not is_plain(template)


def is_plain(template: Any) -> bool:
    """Whether a chat template is a `plain_chat_template`."""
    first, *_ = PLAIN_CHAT.splitlines()
    return isinstance(template, str) and template.startswith(first)


def plain_chat_template(text: str = PLAIN_TEMPLATE) -> str:
    """`PLAIN_CHAT` for a model that continues `text`, with `{prompt}` in it.

    For a tokenizer that puts BOS in front of a text."""
    before, after = map(json.dumps, text.split(FIELD))  # a JSON text is one in Jinja too
    return Template(PLAIN_CHAT).substitute(before=before, after=after)


def prompts_of(tokenizer: Any) -> Prompts:
    """The prompts of a model's tokenizer. Raises ModelError if they cannot be used."""
    saved = getattr(tokenizer, "init_kwargs", {}).get(KEY)
    if saved is None:
        return Prompts()
    try:
        return Prompts(**saved)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{tokenizer.name_or_path}: {KEY} in its tokenizer_config.json cannot be used: {error}"
        ) from None


def set_prompts(tokenizer: Any, prompts: Prompts) -> None:
    """Give a model's tokenizer the prompts that are not None; its others stay.

    Raises UserError for a system prompt without a chat template."""
    given = {name: value for name, value in vars(prompts).items() if value is not None}
    if "system_prompt" in given and not is_chat(tokenizer):
        name = getattr(tokenizer, "name_or_path", None) or "the model"
        raise UserError(
            f"argument --system_prompt: {name} has no chat template, so it knows no system "
            "message: write the text into a --prompt_template"
        )
    if given:
        tokenizer.init_kwargs[KEY] = vars(prompts_of(tokenizer)) | given
    if "prompt_template" in given and is_plain(getattr(tokenizer, "chat_template", None)):
        tokenizer.chat_template = plain_chat_template(given["prompt_template"])
