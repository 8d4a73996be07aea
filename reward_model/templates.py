"""The question that a language model is asked as a judge, and the chat formats around it."""

import re
from dataclasses import dataclass

from common.errors import JudgeError
from lm.text_encoding import PLAIN_QUESTION, PLAIN_TEMPLATE


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
# template -> pattern in the model's chat template or name; the first match is used
MARKERS = {
    "chatml": r"<\|im_start\|>|chatml",
    "zephyr": r"<\|user\|>|zephyr|tinyllama.*chat",
    "llama-2": r"\[INST\]|llama[-_ ]?2.*chat|mistral.*instruct",
}
YES, NO = ("Yes", "yes", "YES"), ("No", "no", "NO")


def named_template(name: str) -> JudgeTemplate:
    """The template with this name. Raises JudgeError for an unknown name."""
    if name not in TEMPLATES:
        raise JudgeError(f"unknown judge template {name!r}: expected one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def fitting_template(description: str) -> str:
    """The key of TEMPLATES that fits a model's chat template and name."""
    for name, marker in MARKERS.items():
        if re.search(marker, description, re.IGNORECASE):
            return name
    return "plain"
