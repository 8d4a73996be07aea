"""The one way from text to token ids, for training, sampling and scoring.

A response of K steps is written `step 1 \\n step 2 \\n ... step K`. If step K states the final
answer, the end-of-text token (EOS) follows. If the solution continues (a step pair, a prefix), a
newline follows. `TextEncoder` decides which special tokens a text gets (docs/text_to_ids.md).
"""

import bisect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from common.errors import ModelError, short
from lm.chat_template import tokenizer_frame
from lm.prompting import FIELD, PLAIN_TEMPLATE, is_chat, prompts_of
from reasoning.steps import ends_solution

PLAIN_QUESTION = "Right?"  # what a judge without a chat template is asked after a step
CHAT_INSTRUCTION = (
    "Solve the problem step by step. Write one short step a line, beginning with 'Step 1:', "
    "and end with a line 'Answer: ' and the result.\n\n"
)

# merges with nothing: text behind it is tokenized as the middle of a text
EDGE = "\n"
IN_BRACKETS = re.compile(r"<.+>|\[.+\]")
# marks where a word that reads like a control token is cut apart; no user's text can contain it
CUT = "\ud800"


def format_prompt(
    prompt: str, tokenizer: Any = None, chat: bool = False, thinks: bool = False
) -> str:
    """The text that a policy continues, with the prompts of lm/prompting.py.

    A chat model (`is_chat`) gets the instruction and the prompt as the
    user's message; chat: the prompt alone. thinks: thinking is turned on instead of off. Raises
    ModelError if the template cannot be used."""
    prompts = prompts_of(tokenizer)
    if is_chat(tokenizer):
        message = prompt if chat else prompts.fill(f"{CHAT_INSTRUCTION}{FIELD}", prompt)
        system = [] if prompts.system_prompt is None else [prompts.system_prompt]
        frame = tokenizer_frame(tokenizer, has_system=bool(system), thinks=thinks)
        return frame.fill(*system, message)
    return prompts.fill(PLAIN_TEMPLATE, prompt)


def encode_prompt(
    tokenizer: Any, prompt: str, chat: bool = False, thinks: bool = False
) -> list[int]:
    """Token ids of the template with the prompt. chat, thinks: as in `format_prompt`."""
    encoder = text_encoder(tokenizer)
    guarded, _ = encoder.guard(prompt, [])
    text = format_prompt(guarded, tokenizer, chat, thinks)
    return encoder.start(is_chat=is_chat(tokenizer)) + encoder.ids([text])[0]


def response_pieces(steps: list[str], finished: bool) -> list[str]:
    """The texts of the steps, which joined are the response.

    Each ends with a newline; the last one of a `finished` response does not."""
    last = len(steps) - 1
    return [step + ("" if finished and k == last else "\n") for k, step in enumerate(steps)]


def encode_steps(
    tokenizer: Any, prompt: str, prefix: list[str], steps: list[str]
) -> tuple[list[int], list[int]]:
    """Token ids of template, prompt, prefix and steps, and the step of every token.

    The steps are 0 .. len(steps) - 1, or -1 before them. The whole text is tokenized once and cut
    by character offsets. A token that straddles a boundary belongs to the earlier step. A response
    that ends the solution gets EOS, which belongs to its last step. Raises ModelError for text that
    is not Unicode, and for a tokenizer that has no EOS or gives no offsets."""
    encoder = text_encoder(tokenizer)
    finished = bool(steps) and ends_solution([*prefix, *steps])
    prompt, guarded = encoder.guard(prompt, [*prefix, *steps])
    prefix, steps = guarded[: len(prefix)], guarded[len(prefix) :]
    before = format_prompt(prompt, tokenizer) + "".join(response_pieces(prefix, finished=False))
    pieces = [before, *response_pieces(steps, finished)]
    ids, offsets = encoder.with_offsets("".join(pieces))
    ends = list(itertools.accumulate(len(piece) - piece.count(CUT) for piece in pieces))
    step_of, reached = [], 0
    for start, end in offsets:
        # offsets may leave white space out (trim_offsets): a newline belongs to the step it closes
        begin = min(start, reached)
        step_of.append(min(bisect.bisect_right(ends, begin), len(steps)) - 1)
        reached = max(reached, end)
    leading = encoder.start(is_chat=is_chat(tokenizer))
    ids, step_of = leading + ids, [-1] * len(leading) + step_of
    if finished:
        return [*ids, encoder.eos_id], [*step_of, len(steps) - 1]
    return ids, step_of


class TextEncoder:
    """Decides which special tokens a text gets, for one tokenizer.

    - Start: a text in a plain template begins with the ids that the tokenizer puts in front of a
      text (BOS or [CLS], or nothing). A chat template writes them itself.
    - End: EOS stands behind a finished response and nowhere else. What the tokenizer puts behind a
      text is never used.
    - Between: only the template writes control tokens. A user's word that reads like one stays
      text. Control tokens are the tokenizer's special tokens, its added tokens in brackets
      (`<think>`, `[INST]`) or in the chat template, and `marks`: texts that only the model's own
      format may write.

    Raises ModelError for a tokenizer that gives no character offsets."""

    def __init__(self, tokenizer: Any, *marks: str):
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                "the tokenizer gives no character offsets, which are needed to find the steps: use "
                "a fast one (tokenizer.json)"
            )
        self.tokenizer = tokenizer
        whole = tokenizer("a")["input_ids"]
        self.leading_ids: list[int] = whole[: whole.index(self._ids("a")[0])]
        template = str(tokenizer.chat_template or "")
        control = {
            index: token
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special
            or token.content in tokenizer.all_special_tokens
            or IN_BRACKETS.fullmatch(token.content)
            or (len(token.content) > 1 and token.content in template)
        }
        self._control_ids = {*control}
        has_normalizer = tokenizer.backend_tokenizer.normalizer is not None
        self._is_normalized = has_normalizer and any(t.normalized for t in control.values())
        texts = {token.content for token in control.values()} | {*marks}
        pattern = "|".join(re.escape(text) for text in texts if len(text) > 1)
        self._control = re.compile(f"(?={pattern})(.)" if pattern else "(?!)()", re.DOTALL)

    def start(self, is_chat: bool) -> list[int]:
        """The ids in front of a text. is_chat: a chat template wrote the text."""
        return [] if is_chat else self.leading_ids

    @property
    def eos_id(self) -> int:
        """The id behind a finished response. Raises ModelError if the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no end-of-text token, which ends a solution: name its "
                "eos_token in tokenizer_config.json"
            )
        return self.tokenizer.eos_token_id

    def guard(self, prompt: str, steps: Sequence[str]) -> tuple[str, list[str]]:
        """A user's texts with `CUT` in every word that reads like a control token.

        Raises ModelError for a text that is not Unicode."""
        try:
            "".join((prompt, *steps)).encode()
        except UnicodeEncodeError:
            raise ModelError(
                f"prompt {short(prompt)}: half of a Unicode surrogate pair cannot be scored"
            ) from None
        prompt, *steps = (self._guard(text) for text in (prompt, *steps))
        return prompt, steps

    def _guard(self, text: str) -> str:
        text = self._control.sub(lambda match: match[1] + CUT, text)
        while self._is_normalized:  # other spellings may be the same token for the tokenizer
            ids, offsets = self.with_offsets(text)
            pairs = zip(ids, offsets, strict=True)
            spans = [span for index, span in pairs if index in self._control_ids]
            starts = [start for start, end in spans if end - start > 1]
            if not starts:
                break
            # offsets do not count CUT
            place = [k for k, letter in enumerate(text) if letter != CUT][starts[0]] + 1
            text = text[:place] + CUT + text[place:]
        return text

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts with guarded words in them, without what stands in front or behind."""
        whole = iter(self._ids([text for text in texts if CUT not in text]))
        return [self.with_offsets(text)[0] if CUT in text else next(whole) for text in texts]

    def with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids as in `ids`, and where in the text without `CUT` the characters of each id are."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        begin = 0
        for k, piece in enumerate(text.split(CUT)):
            edge = len(EDGE) if k else 0  # every piece but the first is the middle of a text
            pairs = self._pairs(EDGE[:edge] + piece)
            if any(start < edge < end for _, (start, end) in pairs):  # one token holds both
                edge, pairs = 0, self._pairs(piece)
            for index, (start, end) in pairs:
                if end > edge or not edge:
                    ids.append(index)
                    offsets.append((begin + max(start - edge, 0), begin + end - edge))
            begin += len(piece)
        return ids, offsets

    def _pairs(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """(id, offsets) of a text's tokens."""
        encoded = self._tokenize(text, return_offsets_mapping=True)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _ids(self, texts: Any) -> Any:
        """Ids of one text, or of each of several texts."""
        return self._tokenize(texts)["input_ids"] if texts else []

    def _tokenize(self, texts: Any, **options: Any) -> Any:
        options |= {"add_special_tokens": False, "split_special_tokens": False, "verbose": False}
        return self.tokenizer(texts, **options)


def text_encoder(tokenizer: Any) -> TextEncoder:
    """The TextEncoder of a tokenizer. It is made anew if the tokenizer got more tokens or another
    template."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    return _encoder(tokenizer, len(tokenizer), template, tuple(tokenizer.all_special_tokens))


@lru_cache(maxsize=8)
def _encoder(tokenizer: Any, *_: Any) -> TextEncoder:
    return TextEncoder(tokenizer)


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
