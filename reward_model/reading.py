"""What the judges that read through transformers share: text that stays text, batches of like length, errors in one line."""

import re
from collections.abc import Iterator, Sequence, Sized
from typing import TypeVar

from reward_model.base import JudgeError, short

EDGE = "\U0010ffff"  # in no vocabulary, merges with nothing: what follows is tokenized as the middle of a text
CUT = "\ud800"  # put into text that reads like a control token, so that it stays text; a user's text cannot hold it
Row = TypeVar("Row", bound=Sized)


class PlainText:
    """Ids of texts in which a user's words stand between a model's control tokens: the words stay words, whatever they look like.

    marks: more texts that only the model's own format may write. `begins`: the ids that the tokenizer puts in front of a text."""

    def __init__(self, tokenizer, *marks: str):
        self.tokenizer = tokenizer
        whole = tokenizer("a")["input_ids"]
        self.begins: list[int] = whole[: whole.index(self._ids("a")[0])]
        control = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        control = "|".join(re.escape(text) for text in {*control, *marks} if len(text) > 1)
        self._control = re.compile(f"(?={control})(.)" if control else "(?!)()", re.DOTALL)

    def guard(self, prompt: str, steps: Sequence[str]) -> tuple[str, list[str]]:
        """A user's texts, to be put between control tokens. Raises JudgeError for what is no Unicode."""
        try:
            "".join((prompt, *steps)).encode()
        except UnicodeEncodeError:
            raise JudgeError(
                f"prompt {short(prompt)}: half of a Unicode surrogate pair cannot be scored"
            ) from None
        prompt, *steps = (
            self._control.sub(lambda match: match[1] + CUT, text) for text in (prompt, *steps)
        )
        return prompt, steps

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts with guarded words in them, without `begins`."""
        whole = iter(self._ids([text for text in texts if CUT not in text]) if texts else [])
        return [self._cut_ids(text) if CUT in text else next(whole) for text in texts]

    def _cut_ids(self, text: str) -> list[int]:
        """Ids of a text in pieces, each but the first tokenized as the middle of a text."""
        first, *rest = text.split(CUT)
        edge = len(self._ids(EDGE))
        return self._ids(first) + [
            index for piece in rest for index in self._ids(EDGE + piece)[edge:]
        ]

    def _ids(self, texts):
        """Ids of a text, or of each of several."""
        return (
            self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            if texts
            else []
        )


def batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Rows of like length together, at most `batch_tokens` padded tokens; a longer row is alone."""
    batch: list[Row] = []
    for row in sorted(rows, key=len):
        if batch and len(row) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def first_line(error: Exception) -> str:
    """The first line of what a library says."""
    said = str(error).strip().replace(":\n", ": ") or type(error).__name__
    return said.splitlines()[0]
