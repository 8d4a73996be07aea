"""The question that a language model is asked as a judge, and the chat formats it is asked in."""

import re
from dataclasses import dataclass

from lm.text_encoding import PLAIN_QUESTION, PLAIN_TEMPLATE


@dataclass(frozen=True)
class JudgeTemplate:
    """How a judge is asked about a step. The text it reads is

        before.format(prompt=...) + step 1 + "\\n" + ... + step k + "\\n" + question

    and the score of step k is P(yes) / (P(yes) + P(no)) of the next token. All text before `question`
    is shared with the questions about later steps, so it is evaluated once. `before` and `question`
    may hold control tokens of the model (`</s>`)."""

    before: str
    question: str


PLAIN = JudgeTemplate(before=PLAIN_TEMPLATE, question=PLAIN_QUESTION)
ASK = "Is the last step of this solution right? Answer Yes or No."
# the content of a user's message, which a chat model's own template frames
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
# template -> pattern in the model's chat template or name; the first that matches is used
MARKERS = {
    "chatml": r"<\|im_start\|>|chatml",
    "zephyr": r"<\|user\|>|zephyr|tinyllama.*chat",
    "llama-2": r"\[INST\]|llama[-_ ]?2.*chat|mistral.*instruct",
}
YES, NO = ("Yes", "yes", "YES"), ("No", "no", "NO")


def fitting_template(description: str) -> str:
    """The key of TEMPLATES that fits a model's chat template and name."""
    for name, marker in MARKERS.items():
        if re.search(marker, description, re.IGNORECASE):
            return name
    return "plain"
