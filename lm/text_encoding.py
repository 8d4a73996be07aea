"""The one way from text to token ids, for training, sampling and scoring.

A response of K steps is written `step 1 \\n step 2 \\n ... step K`. If step K states the final
answer, the end-of-text token (EOS) follows, added as an id. If the solution continues (a step pair,
a prefix), a newline follows."""

import bisect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from common.errors import ModelError, short
from lm.chat_template import tokenizer_frame
from reasoning.steps import ends_solution

PLAIN_TEMPLATE = "Problem: {prompt}\nSolution:\n"
PLAIN_QUESTION = "Right?"  # what a judge without a chat template is asked after a step
CHAT_INSTRUCTION = (
    "Solve the problem step by step. Write one short step a line, beginning with 'Step 1:', "
    "and end with a line 'Answer: ' and the result.\n\n"
)


def format_prompt(prompt: str, tokenizer: Any = None, instruction: str = CHAT_INSTRUCTION) -> str:
    """The text that a policy continues.

    A chat model (a tokenizer with a chat template) gets the instruction and the prompt as the
    user's message, with thinking turned off. Raises ModelError if the template cannot be used."""
    if getattr(tokenizer, "chat_template", None):
        return tokenizer_frame(tokenizer).fill(instruction + prompt)
    return PLAIN_TEMPLATE.format(prompt=prompt)


def encode_prompt(tokenizer: Any, prompt: str, chat: bool = False) -> list[int]:
    """Token ids of the template with the prompt. chat: without the instruction of the template."""
    text = format_prompt(prompt, tokenizer, "" if chat else CHAT_INSTRUCTION)
    add = not tokenizer.chat_template  # a chat template writes the special tokens itself
    return tokenizer(text, add_special_tokens=add, verbose=False)["input_ids"]


def response_pieces(steps: list[str], finished: bool) -> list[str]:
    """The texts of the steps, which joined are the response.

    Each ends with a newline; the last one of a `finished` response does not."""
    last = len(steps) - 1
    return [step + ("" if finished and k == last else "\n") for k, step in enumerate(steps)]


def check_offsets(tokenizer: Any) -> None:
    """Raises ValueError for a tokenizer without character offsets, which `encode_steps` needs."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "the tokenizer gives no character offsets, which are needed to find the steps: use a "
            "fast one (tokenizer.json)"
        )


def encode_steps(
    tokenizer: Any, prompt: str, prefix: list[str], steps: list[str]
) -> tuple[list[int], list[int]]:
    """Token ids of template, prompt, prefix and steps, and the step of every token.

    The steps are 0 .. len(steps) - 1, or -1 before them. The whole text is tokenized once and cut
    by character offsets, which only a fast tokenizer gives. A token that straddles a boundary
    belongs to the earlier step. A response that ends the solution gets EOS, which belongs to its
    last step."""
    finished = ends_solution(steps)
    before = format_prompt(prompt, tokenizer) + "".join(response_pieces(prefix, finished=False))
    pieces = [before, *response_pieces(steps, finished)]
    add = not tokenizer.chat_template  # a chat template writes the special tokens itself
    encoded = tokenizer("".join(pieces), return_offsets_mapping=True, add_special_tokens=add)
    ends = list(itertools.accumulate(map(len, pieces)))
    step_of, reached = [], 0
    for start, end in encoded["offset_mapping"]:
        # offsets may leave white space out (trim_offsets): a newline belongs to the step it closes
        begin = min(start, reached)
        step_of.append(min(bisect.bisect_right(ends, begin), len(steps)) - 1)
        reached = max(reached, end)
    ids = list(encoded["input_ids"])
    if finished:
        return [*ids, tokenizer.eos_token_id], [*step_of, len(steps) - 1]
    return ids, step_of


# --- text of a user between a model's control tokens ---

# in no vocabulary and merged with nothing: text behind it is tokenized as the middle of a text
EDGE = "\U0010ffff"
# marks where a word that reads like a control token is cut apart; no user's text can contain it
CUT = "\ud800"


class PlainText:
    """Ids of texts with a user's words between a model's control tokens.

    A user's word that reads like a control token stays text. marks: more texts that only the
    model's own format may write. `leading_ids`: the ids that the tokenizer puts in front of a text
    (BOS)."""

    def __init__(self, tokenizer: Any, *marks: str):
        self.tokenizer = tokenizer
        whole = tokenizer("a")["input_ids"]
        self.leading_ids: list[int] = whole[: whole.index(self._ids("a")[0])]
        added = tokenizer.added_tokens_decoder.values()
        control = {token.content for token in added if token.special} | {*marks}
        pattern = "|".join(re.escape(text) for text in control if len(text) > 1)
        self._control = re.compile(f"(?={pattern})(.)" if pattern else "(?!)()", re.DOTALL)

    def guard(self, prompt: str, steps: Sequence[str]) -> tuple[str, list[str]]:
        """A user's texts with `CUT` in every word that reads like a control token.

        Raises ModelError for a text that is not Unicode."""
        try:
            "".join((prompt, *steps)).encode()
        except UnicodeEncodeError:
            raise ModelError(
                f"prompt {short(prompt)}: half of a Unicode surrogate pair cannot be scored"
            ) from None
        prompt, *steps = (
            self._control.sub(lambda match: match[1] + CUT, text) for text in (prompt, *steps)
        )
        return prompt, steps

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts with guarded words in them, without `leading_ids`."""
        whole = iter(self._ids([text for text in texts if CUT not in text]))
        return [self._cut_ids(text) if CUT in text else next(whole) for text in texts]

    def _cut_ids(self, text: str) -> list[int]:
        """Ids of a text in pieces, each but the first tokenized as the middle of a text."""
        first, *rest = text.split(CUT)
        edge = len(self._ids(EDGE))
        tail = [index for piece in rest for index in self._ids(EDGE + piece)[edge:]]
        return self._ids(first) + tail

    def _ids(self, texts: Any) -> Any:
        """Ids of one text, or of each of several texts."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


Row = TypeVar("Row")


def batches_by_length(
    rows: Iterable[Row], batch_tokens: int, length: Callable[[Any], int] = len
) -> Iterator[list[Row]]:
    """Batches of rows of similar length, at most `batch_tokens` padded tokens each.

    A longer row is alone in its batch. length(row): the number of its tokens."""
    batch: list[Row] = []
    for row in sorted(rows, key=length):
        if batch and length(row) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
