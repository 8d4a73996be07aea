"""Process reward models that others published, in the formats they were trained in, behind the same protocol.

A family is told by its architecture in config.json, or by its name: that of the folder or of the model on the hub. None of the code
that comes with them is run. Steps go in as they are; what stands around them is the publisher's.
"""

import re

from torch import Tensor, nn
from transformers import Qwen2Model, Qwen2PreTrainedModel

from reward_model.process_reward_model import PRMFormat


class ForeignFormat(PRMFormat):
    tag: str
    tell: str  # in the architecture or the name

    def __init__(self, tokenizer):
        super().__init__(tokenizer, self.tag)

    @classmethod
    def is_told_by(cls, name: str, config: dict) -> bool:
        says = [name, str(config.get("_name_or_path", "")), *(config.get("architectures") or [])]
        return any(re.search(cls.tell, text, re.IGNORECASE) for text in says)


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


class QwenMath(ForeignFormat):
    """Qwen/Qwen2.5-Math-PRM-7B and -72B, Qwen/Qwen2.5-Math-7B-PRM800K (Zhang et al. 2025, arXiv 2501.07301): the chat template, the
    steps as the assistant's answer, `<extra_0>` behind each, where the probability of label 1 is the step's value."""

    tag, tell = "<extra_0>", r"ForProcessRewardModel|Qwen2\.5-Math-(7B-|72B-)?PRM"
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


class SignTokens(ForeignFormat):
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

    tag, tell, signs = "ки", r"math-?shepherd.*prm", ("a +", "a -")

    def text(self, prompt: str, steps: list[str]) -> str:
        return f"{prompt} " + "\n".join(f"{step} {self.tag}" for step in steps)


class RLHFlow(SignTokens):
    """RLHFlow/Llama3.1-8B-PRM-Deepseek-Data and -Mistral-Data (Xiong et al. 2024): a conversation in which the user writes a step
    a turn, the first behind the problem, and the assistant answers each with `+`; the value is read where that is predicted."""

    tag, tell, signs = "<|eot_id|>", r"Llama-?3\.1-8B-PRM|RLHFlow.*PRM", ("\n\n+", "\n\n-")

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
        ends = super().places(ids, count)[
            -2 * count :
        ]  # of the turns; the template may write a system message before them
        return [
            end - 2 for end in ends[1::2]
        ]  # what stands before `+` and the end of an assistant's turn


FOREIGN = {
    "Qwen2.5-Math-PRM": QwenMath,
    "math-shepherd-mistral-7b-prm": MathShepherd,
    "Llama3.1-8B-PRM": RLHFlow,
}
