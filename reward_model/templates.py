"""The question that a language model is asked as a judge, and the chat formats around it."""

import re
from dataclasses import dataclass

from common.errors import JudgeError, short
from lm.chat_template import ChatFrame, chat_frame, default_template
from lm.gguf_file import GGUFFile, TokenType
from lm.prompting import PLAIN_TEMPLATE, is_plain
from lm.text_encoding import PLAIN_QUESTION


@dataclass(frozen=True)
class JudgeTemplate:
    """The text in which a judge is asked about step k:

        before.format(prompt=...) + step 1 + "\\n" + ... + step k + "\\n" + question

    The score of the step is P(yes) / (P(yes) + P(no)) of the next token. The questions about later
    steps share all text before `question`, so it is evaluated once. `before` and `question` may
    hold control tokens of the model (`</s>`)."""

    before: str
    question: str


PLAIN = JudgeTemplate(before=PLAIN_TEMPLATE, question=PLAIN_QUESTION)
ASK = "Is the last step of this solution right? Answer Yes or No."
# the content of a user's message; the chat template of the model is put around it
CHAT = JudgeTemplate(before=PLAIN_TEMPLATE, question=f"\n{ASK}")
_PROBLEM = "Problem: {prompt}\nSolution:\n"
TEMPLATES: dict[str, JudgeTemplate] = {
    "plain": PLAIN,
    "zephyr": JudgeTemplate(f"<|user|>\n{_PROBLEM}", f"\n{ASK}</s>\n<|assistant|>\n"),
    "llama-2": JudgeTemplate(f"[INST] {_PROBLEM}", f"\n{ASK} [/INST]"),
    "chatml": JudgeTemplate(
        f"<|im_start|>user\n{_PROBLEM}", f"\n{ASK}<|im_end|>\n<|im_start|>assistant\n"
    ),
}
# template -> pattern in the name of a model without a chat template; the first match is used
NAMES = {
    "chatml": r"chatml",
    "zephyr": r"zephyr|tinyllama.*chat",
    "llama-2": r"llama[-_ ]?2.*chat|mistral.*instruct",
}
YES, NO = ("Yes", "yes", "YES"), ("No", "no", "NO")


def named_template(name: str) -> JudgeTemplate:
    """The template with this name. Raises JudgeError for an unknown name."""
    if name not in TEMPLATES:
        raise JudgeError(f"unknown judge template {name!r}: expected one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def chat_judge_template(frame: ChatFrame) -> JudgeTemplate:
    """The question as a user's message in a model's own chat template."""
    before, after = frame.pieces
    return JudgeTemplate(before + CHAT.before, CHAT.question + after)


def gguf_template(file: GGUFFile, leading: str = "") -> tuple[str, JudgeTemplate]:
    """(name, template) of a GGUF file: its own chat template, named "chat", or one by its name.

    leading: what the encoder puts in front of every text (BOS). Raises JudgeError if the chat
    template cannot be used."""
    if file.chat_templates and not is_plain(file.chat_templates.get("default")):
        try:
            return "chat", _own_template(file, leading)
        except ValueError as error:
            raise unusable_template(file.path, error) from None
    return template_by_name(file.path, str(file.metadata.get("general.name", "")))


def template_by_name(path: str, name: str) -> tuple[str, JudgeTemplate]:
    """(name, template) for a model without a chat template.

    A guess other than plain is printed."""
    for template, pattern in NAMES.items():
        if re.search(pattern, name[:200], re.IGNORECASE):
            print(
                f"judge {path}: it has no chat template; the template {template} is used because "
                f"of its name, {short(name)} (--judge_template chooses another)"
            )
            return template, TEMPLATES[template]
    return "plain", PLAIN


def unusable_template(path: str, reason: object) -> JudgeError:
    """The error for a judge whose own chat template cannot be used."""
    return JudgeError(
        f"judge {path}: its chat template cannot be used: {reason}; "
        f"choose one with --judge_template ({', '.join(TEMPLATES)})"
    )


def _own_template(file: GGUFFile, leading: str) -> JudgeTemplate:
    """Raises ValueError with the reason if the chat template cannot be used."""
    frame = chat_frame(default_template(file.chat_templates), file.special_tokens)
    template = chat_judge_template(frame)
    # the encoder's BOS and not the template's: text behind it begins with a space, as it must
    template = JudgeTemplate(template.before.removeprefix(leading), template.question)
    tokens, kinds = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if isinstance(tokens, list) and isinstance(kinds, list):
        written = set(re.findall(r"<\|[^<>|]+\|>|</?s>", template.before + template.question))
        for token, kind in zip(tokens, kinds, strict=False):
            if token in written and kind == TokenType.NORMAL:
                raise ValueError(f"it writes {token!r}, which the vocabulary holds as plain text")
    return template
