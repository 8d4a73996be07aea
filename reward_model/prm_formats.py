"""The formats of process reward models (PRMs): this project's own, and those that others published.

A published family is recognized by its architecture in config.json, or by its name: that of the folder
or of the model on the hub. Code that comes with a model is never run. Steps are read as they are; the
text around them is the publisher's.
"""

import re
from collections.abc import Sequence

from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    Qwen2Model,
    Qwen2PreTrainedModel,
)

from common.errors import JudgeError
from lm.text_encoding import PlainText, format_prompt
from reward_model.protocols import Solution, describe_step

STEP_TOKEN = "<next>"


class PRMFormat:
    """How the PRMs of one family read a solution, and what they say of it. `tag` is the token they know a step by; in a user's text
    it stays text. Raises JudgeError for a tokenizer that has no such token."""

    model_class: type = AutoModelForCausalLM

    def __init__(self, tokenizer, tag: str):
        self.tokenizer, self.tag = tokenizer, tag
        self.plain = PlainText(tokenizer, tag)
        self.tag_id = self.token_id(f"a {tag}", tag)

    def token_id(self, text: str, token: str) -> int:
        """The id of a token in the place it has in a text that ends with it."""
        index = self.plain.ids([text])[0][-1]
        if self.tokenizer.decode([index]).strip() != token:
            raise JudgeError(f"the tokenizer does not know {token!r} as one token")
        return index

    def encode(self, solutions: Sequence[Solution]) -> list[tuple[list[int], list[int]]]:
        """For every solution its ids, and for each of its steps the position where its value is read. The beginning of a solution
        has the ids and the positions that the whole begins with. Raises JudgeError for what is no Unicode."""
        texts = [self.text(*self.plain.guard(prompt, steps)) for prompt, steps in solutions]
        # a chat template writes what begins a text itself
        begins = [] if self.tokenizer.chat_template else self.plain.begins
        encoded = []
        for (prompt, steps), ids in zip(solutions, self.plain.ids(texts), strict=True):
            ids = begins + ids
            places = self.places(ids, len(steps))
            if len(places) != len(steps):
                raise JudgeError(
                    f"{len(places)} of {len(steps)} steps can be told apart in {describe_step(prompt, steps, 0)}"
                )
            encoded.append((ids, places))
        return encoded

    def text(self, prompt: str, steps: list[str]) -> str:
        """Problem and steps as the model reads them."""
        raise NotImplementedError

    def places(self, ids: list[int], count: int) -> list[int]:
        """Where the values of the `count` steps are read: at their tags."""
        return [place for place, index in enumerate(ids) if index == self.tag_id]

    def log_odds(self, model, rows: Tensor, places: Tensor, **inputs) -> Tensor:
        """log (value / (1 - value)) at N places of a batch: rows (N,), places (N,), inputs of the model -> (N,)."""
        raise NotImplementedError


class StepTokens(PRMFormat):
    """This project's own: a step token before every step, one logit at its last token."""

    model_class = AutoModelForTokenClassification

    def __init__(self, tokenizer, tag: str = STEP_TOKEN):
        super().__init__(tokenizer, tag)

    def text(self, prompt: str, steps: list[str]) -> str:
        return format_prompt(prompt, self.tokenizer) + "".join(
            f"{self.tag}{step}\n" for step in steps
        )

    def places(self, ids: list[int], count: int) -> list[int]:
        begins = super().places(ids, count)
        return [*(place - 1 for place in begins[1:]), len(ids) - 1] if begins else []

    def log_odds(self, model, rows: Tensor, places: Tensor, **inputs) -> Tensor:
        return model(**inputs).logits[rows, places, 0]


class PublishedFormat(PRMFormat):
    tag: str
    marker: str  # in the architecture or the name

    def __init__(self, tokenizer):
        super().__init__(tokenizer, self.tag)

    @classmethod
    def matches(cls, name: str, config: dict) -> bool:
        says = [name, str(config.get("_name_or_path", "")), *(config.get("architectures") or [])]
        return any(re.search(cls.marker, text, re.IGNORECASE) for text in says)


class _Qwen2PRM(Qwen2PreTrainedModel):
    """Qwen2 with two labels a token: Linear, ReLU, Linear."""

    def __init__(self, config):
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.score = nn.Sequential(
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.ReLU(),
            nn.Linear(config.hidden_size, 2),
        )
        self.post_init()


class QwenMath(PublishedFormat):
    """Qwen/Qwen2.5-Math-PRM-7B and -72B, Qwen/Qwen2.5-Math-7B-PRM800K (Zhang et al. 2025, arXiv 2501.07301): the chat template, the
    steps as the assistant's answer, `<extra_0>` behind each, where the probability of label 1 is the step's value."""

    tag, marker = "<extra_0>", r"ForProcessRewardModel|Qwen2\.5-Math-(7B-|72B-)?PRM"
    model_class = _Qwen2PRM
    system = "Please reason step by step, and put your final answer within \\boxed{}."

    def text(self, prompt: str, steps: list[str]) -> str:
        answer = "".join(step + self.tag for step in steps)
        messages = [("system", self.system), ("user", prompt), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in messages]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=False
        )

    def log_odds(self, model, rows: Tensor, places: Tensor, **inputs) -> Tensor:
        logits = model.score(model.model(**inputs).last_hidden_state[rows, places])  # (N, 2)
        return logits[:, 1] - logits[:, 0]


class SignTokens(PublishedFormat):
    """Causal LMs that say `+` or `-` of a step: its value is P(+) / (P(+) + P(-)) of the token that comes next."""

    signs: tuple[str, str]  # + and - as they stand in the text

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.sign_ids = [self.token_id(text, text[-1]) for text in self.signs]

    def log_odds(self, model, rows: Tensor, places: Tensor, **inputs) -> Tensor:
        hidden = model.base_model(**inputs).last_hidden_state[rows, places]  # (N, H)
        logits = model.get_output_embeddings()(hidden)[:, self.sign_ids]
        return logits[:, 0] - logits[:, 1]


class MathShepherd(SignTokens):
    """peiyi9979/math-shepherd-mistral-7b-prm (Wang et al. 2024, arXiv 2312.08935): question and steps as plain text, ` ки` and a
    newline behind each step; the value is read at the tag."""

    tag, marker, signs = "ки", r"math-?shepherd.*prm", ("a +", "a -")

    def text(self, prompt: str, steps: list[str]) -> str:
        return f"{prompt} " + "\n".join(f"{step} {self.tag}" for step in steps)


class RLHFlow(SignTokens):
    """RLHFlow/Llama3.1-8B-PRM-Deepseek-Data and -Mistral-Data (Xiong et al. 2024): a conversation in which the user writes a step
    a turn, the first behind the problem, and the assistant answers each with `+`; the value is read where that is predicted."""

    tag, marker, signs = "<|eot_id|>", r"Llama-?3\.1-8B-PRM|RLHFlow.*PRM", ("\n\n+", "\n\n-")

    def text(self, prompt: str, steps: list[str]) -> str:
        turns = [f"{prompt} {steps[0]}", *steps[1:]]
        messages = [
            message
            for turn in turns
            for message in (
                {"role": "user", "content": turn},
                {"role": "assistant", "content": "+"},
            )
        ]
        return self.tokenizer.apply_chat_template(messages, tokenize=False)

    def places(self, ids: list[int], count: int) -> list[int]:
        # of the turns; the template may write a system message before them
        ends = super().places(ids, count)[-2 * count :]
        # what stands before `+` and the end of an assistant's turn
        return [end - 2 for end in ends[1::2]]


PUBLISHED = {
    "Qwen2.5-Math-PRM": QwenMath,
    "math-shepherd-mistral-7b-prm": MathShepherd,
    "Llama3.1-8B-PRM": RLHFlow,
}
