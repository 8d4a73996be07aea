"""The formats of process reward models (PRMs): this project's own and published ones.

A published format is recognized by the architecture in config.json or by the model's name (its
folder, or its name on the hub). Code that comes with a model is never run. The steps are put into
the text unchanged; the text around them is the publisher's.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    Qwen2Model,
    Qwen2PreTrainedModel,
)

from common.errors import JudgeError, ModelError
from lm.chat_template import render_chat
from lm.prompting import is_chat
from lm.text_encoding import TextEncoder, format_prompt
from reward_model.protocols import Solution, describe_step

STEP_TOKEN = "<next>"


class PRMFormat:
    """How the PRMs of one family read a solution, and how their output becomes values.

    tag: the token that marks a step (default: the family's own); in a user's text it is read as
    plain text. Raises ModelError for a tokenizer without such a token."""

    model_class: type = AutoModelForCausalLM
    tag: str
    is_chat = False  # whether a chat template writes the text

    def __init__(self, tokenizer: Any, tag: str | None = None):
        self.tokenizer, self.tag = tokenizer, tag or self.tag
        self.encoder = TextEncoder(tokenizer, self.tag)
        self.tag_id = self.token_id(f"a {self.tag}", self.tag)

    def token_id(self, text: str, token: str) -> int:
        """The id of the last token of a text. Raises ModelError if it is not this token."""
        index = self.encoder.ids([text])[0][-1]
        if self.tokenizer.decode([index]).strip() != token:
            raise ModelError(f"the tokenizer does not know {token!r} as one token")
        return index

    def encode(self, solutions: Sequence[Solution]) -> list[tuple[list[int], list[int]]]:
        """For every solution its ids, and for each of its steps the position of its value.

        The ids and positions of a solution's prefix are a prefix of the solution's. Raises
        ModelError for text that is not Unicode, JudgeError if a step is not found in the ids."""
        texts = [self.text(*self.encoder.guard(prompt, steps)) for prompt, steps in solutions]
        leading = self.encoder.start(self.is_chat)
        encoded = []
        for (prompt, steps), ids in zip(solutions, self.encoder.ids(texts), strict=True):
            ids = leading + ids
            places = self.places(ids, len(steps))
            if len(places) != len(steps):
                found = f"only {len(places)} of {len(steps)} steps are found by their tags"
                raise JudgeError(f"{found} in {describe_step(prompt, steps, 0)}")
            encoded.append((ids, places))
        return encoded

    def text(self, prompt: str, steps: list[str]) -> str:
        """Problem and steps as the model reads them."""
        raise NotImplementedError

    def places(self, ids: list[int], count: int) -> list[int]:
        """The positions of the values of the `count` steps: those of their tags."""
        return [place for place, index in enumerate(ids) if index == self.tag_id]

    def log_odds(self, model: Any, rows: Tensor, places: Tensor, **inputs: Any) -> Tensor:
        """log(value / (1 - value)) at N places of a batch: rows (N,), places (N,), and the inputs
        of the model -> (N,)."""
        raise NotImplementedError


class StepTokens(PRMFormat):
    """This project's own format: a step token before every step, a logit at its last token."""

    model_class, tag = AutoModelForTokenClassification, STEP_TOKEN

    def __init__(self, tokenizer: Any, tag: str | None = None):
        super().__init__(tokenizer, tag)
        self.is_chat = is_chat(tokenizer)

    def text(self, prompt: str, steps: list[str]) -> str:
        lines = "".join(f"{self.tag}{step}\n" for step in steps)
        return format_prompt(prompt, self.tokenizer) + lines

    def places(self, ids: list[int], count: int) -> list[int]:
        begins = super().places(ids, count)
        return [*(place - 1 for place in begins[1:]), len(ids) - 1] if begins else []

    def log_odds(self, model: Any, rows: Tensor, places: Tensor, **inputs: Any) -> Tensor:
        return model(**inputs).logits[rows, places, 0]


class PublishedFormat(PRMFormat):
    """A format of another publisher. marker: pattern in the architecture or the name."""

    marker: str

    @classmethod
    def matches(cls, name: str, config: dict) -> bool:
        """Whether a model with this name and config.json has this format."""
        hints = [name, str(config.get("_name_or_path", "")), *(config.get("architectures") or [])]
        return any(re.search(cls.marker, hint, re.IGNORECASE) for hint in hints)


class _Qwen2PRM(Qwen2PreTrainedModel):
    """Qwen2 with two labels for each token: Linear, ReLU, Linear."""

    def __init__(self, config: Any):
        super().__init__(config)
        size = config.hidden_size
        self.model = Qwen2Model(config)
        self.score = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 2))
        self.post_init()


class QwenMath(PublishedFormat):
    """Qwen/Qwen2.5-Math-PRM-7B and -72B, Qwen/Qwen2.5-Math-7B-PRM800K.

    (Zhang et al. 2025, arXiv 2501.07301.) The chat template with the steps as the assistant's
    answer, `<extra_0>` after each step; a step's value is the probability of label 1 there."""

    tag, marker = "<extra_0>", r"ForProcessRewardModel|Qwen2\.5-Math-(7B-|72B-)?PRM"
    model_class, is_chat = _Qwen2PRM, True
    system = "Please reason step by step, and put your final answer within \\boxed{}."

    def text(self, prompt: str, steps: list[str]) -> str:
        answer = "".join(step + self.tag for step in steps)
        turns = [("system", self.system), ("user", prompt), ("assistant", answer)]
        return render_chat(self.tokenizer, turns)

    def log_odds(self, model: Any, rows: Tensor, places: Tensor, **inputs: Any) -> Tensor:
        logits = model.score(model.model(**inputs).last_hidden_state[rows, places])  # (N, 2)
        return logits[:, 1] - logits[:, 0]


class SignTokens(PublishedFormat):
    """Causal LMs that answer each step with `+` or `-`.

    The value of a step is P(+) / (P(+) + P(-)) for the next token. signs: `+` and `-` with the text
    before them, each the last token of its text."""

    signs: tuple[str, str]

    def __init__(self, tokenizer: Any, tag: str | None = None):
        super().__init__(tokenizer, tag)
        self.sign_ids = [self.token_id(text, text[-1]) for text in self.signs]

    def log_odds(self, model: Any, rows: Tensor, places: Tensor, **inputs: Any) -> Tensor:
        hidden = model.base_model(**inputs).last_hidden_state[rows, places]  # (N, H)
        logits = model.get_output_embeddings()(hidden)[:, self.sign_ids]
        return logits[:, 0] - logits[:, 1]


class MathShepherd(SignTokens):
    """peiyi9979/math-shepherd-mistral-7b-prm (Wang et al. 2024, arXiv 2312.08935).

    Question and steps as plain text, ` ки` and a newline after each step; the value is read at the
    tag."""

    tag, marker, signs = "ки", r"math-?shepherd.*prm", ("a +", "a -")

    def text(self, prompt: str, steps: list[str]) -> str:
        return f"{prompt} " + "\n".join(f"{step} {self.tag}" for step in steps)


class RLHFlow(SignTokens):
    """RLHFlow/Llama3.1-8B-PRM-Deepseek-Data and -Mistral-Data (Xiong et al. 2024).

    A conversation in which the user writes one step a turn, the first after the problem, and the
    assistant answers each with `+`; the value is read at the token before that `+`."""

    tag, marker, signs = "<|eot_id|>", r"Llama-?3\.1-8B-PRM|RLHFlow.*PRM", ("\n\n+", "\n\n-")
    is_chat = True

    def text(self, prompt: str, steps: list[str]) -> str:
        turns = []
        for turn in (f"{prompt} {steps[0]}", *steps[1:]):
            turns += [("user", turn), ("assistant", "+")]
        return render_chat(self.tokenizer, turns)

    def places(self, ids: list[int], count: int) -> list[int]:
        # the last two for each step: the template may put a system message first
        ends = super().places(ids, count)[-2 * count :]
        # the assistant's turn ends with `+` and the tag; the token before them predicts the `+`
        return [end - 2 for end in ends[1::2]]


PUBLISHED: dict[str, type[PublishedFormat]] = {
    "Qwen2.5-Math-PRM": QwenMath,
    "math-shepherd-mistral-7b-prm": MathShepherd,
    "Llama3.1-8B-PRM": RLHFlow,
}
