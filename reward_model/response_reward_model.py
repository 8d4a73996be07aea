"""The response reward model: one number for a whole response to a prompt. Higher is better, and of two responses to one prompt
sigmoid(r_a - r_b) is the probability that a is the better one (Bradley and Terry 1952).

    Problem: 2 + 3 + 4 = ?
    Solution:
    Step 1: 2 + 3 = 5
    Step 2: 5 + 4 = 9
    Answer: 9
    Right?

Text becomes ids in `ResponseTokens`, to be learned from (trainer/reward_trainer.py) as to be scored here. Only a model that was
trained with a question after the response is asked it, and names it in its config.json: "reward_question": "Right?". One that
began as a PRM reads as that did, with a step token before every step, and names that: "reward_step_token": "<next>".

A reward model is a plain directory for sequence classification with one label, as they are published: any of the hub's is read.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import load_peft_weights
from transformers import AutoModelForSequenceClassification, PreTrainedConfig
from transformers.utils import find_adapter_config_file

from common.errors import JudgeError, ModelError, UserError, first_line, short
from lm.loading import base_of, load_adapter, load_tokenizer, load_weights, scoring_device
from lm.text_encoding import PLAIN_TEMPLATE, PlainText, batches_by_length
from reasoning.steps import split_steps
from reward_model.prm_formats import StepTokens
from reward_model.protocols import Response, ResponseScorer, Solution, StepJudge


class ResponseTokens:
    """How a reward model reads a prompt and a response. max_length: in tokens, None for no limit. question: what stands after the
    response. step_token: what stands before each of its steps, of a model that began as a PRM and reads as that did.

    A chat model reads both in its own template, as a user's message and its answer; an encoder (BERT and its kin) as its two
    sentences, `[CLS] prompt [SEP] response [SEP]`; any other model in the template of reasoning/steps.py, with the question or an
    end-of-text token last. Words that look like control tokens stay words."""

    def __init__(
        self,
        tokenizer,
        max_length: int | None = None,
        question: str | None = None,
        step_token: str | None = None,
    ):
        self.tokenizer, self.max_length, self.question = tokenizer, max_length, question
        self.steps = StepTokens(tokenizer, step_token) if step_token else None
        self.plain = self.steps.plain if self.steps else PlainText(tokenizer)
        self.is_chat = bool(tokenizer.chat_template)
        self.is_pair = not (self.is_chat or self.steps) and None not in (
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
        )

    def encode(self, pairs: Sequence[Response]) -> list[tuple[list[int], int]]:
        """For every (prompt, response) its ids and how many more there would be without max_length. What is too long loses tokens
        from the front, so the beginning of the prompt goes first; what begins every text stays. Raises JudgeError for what is no
        Unicode."""
        guarded = [self.plain.guard(prompt, [response]) for prompt, response in pairs]
        begins, end = self.plain.begins, []
        if self.is_pair:
            between, end = self._frame()
            sides = iter(
                self.plain.ids(
                    [text for prompt, (response,) in guarded for text in (prompt, response)]
                )
            )
            texts = [
                [*prompt, *between, *response]
                for prompt, response in zip(sides, sides, strict=True)
            ]
        else:
            texts = self.plain.ids(
                [self._text(prompt, response) for prompt, (response,) in guarded]
            )
            if self.is_chat:  # its template writes itself what begins and ends a text
                begins = begins if texts and texts[0][: len(begins)] == begins else []
                texts = [ids[len(begins) :] for ids in texts]
            elif not (self.question or self.steps):
                end = [index for index in [self.tokenizer.eos_token_id] if index is not None]
        encoded = []
        for text in texts:
            ids = [*begins, *text, *end]
            over = max(0, len(ids) - (self.max_length or len(ids)))
            encoded.append((ids[: len(begins)] + ids[len(begins) + over :], over))
        return encoded

    def _text(self, prompt: str, response: str) -> str:
        if self.steps:
            return self.steps.text(prompt, split_steps(response))
        if self.is_chat:
            messages = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": response},
            ]
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        return (
            PLAIN_TEMPLATE.replace("{prompt}", prompt)
            + response
            + (f"\n{self.question}" if self.question else "")
        )

    def _frame(self) -> tuple[list[int], list[int]]:
        """What an encoder's tokenizer puts between two sentences, and behind them."""
        (a,), whole = self.plain.ids(["a"]), self.tokenizer("a", "a")["input_ids"]
        first = len(self.plain.begins) + len(a)
        second = whole.index(a[0], first)
        return whole[first:second], whole[second + len(a) :]


def from_causal_lm(model, tokenizer, question: str = ""):
    """A reward model that has learned nothing yet: the backbone of a causal LM, which it takes over, and a head.

    With a question (of a model that is no chat model) the head begins as the model's own logit of "Yes" less that of "No" behind
    it, where each is one token; else as zeros."""
    config = copy.deepcopy(model.config)
    config.num_labels, config.use_cache = 1, False
    if question and not tokenizer.chat_template:
        config.reward_question = question
    with torch.device("meta"):
        reward_model = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
    backbone = reward_model.base_model_prefix
    setattr(reward_model, backbone, model.base_model)
    weights = []
    for name, module in reward_model.named_children():
        if name != backbone:
            module.to_empty(device=model.device)
            weights += module.parameters()
    for weight in weights:
        torch.nn.init.zeros_(weight)
    if hasattr(config, "reward_question"):
        ids = [
            tokenizer(f"{question} {word}", add_special_tokens=False)["input_ids"][-1]
            for word in ("Yes", "No")
        ]
        rows = model.get_output_embeddings().weight
        if [tokenizer.decode([index]).strip() for index in ids] == ["Yes", "No"] and weights[
            0
        ].shape[1:] == rows.shape[1:]:
            weights[0].data[0] = rows[ids[0]].detach() - rows[ids[1]].detach()
    return with_padding(reward_model, tokenizer)


def with_padding(model, tokenizer):
    """The model, told what padding is: LLaMA and its kin read the last token that is none."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = (
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
    return model


def format_of(model) -> tuple[str | None, str | None]:
    """(question, step token) that a reward model was trained with."""
    return getattr(model.config, "reward_question", None), getattr(
        model.config, "reward_step_token", None
    )


def longest(model, tokenizer) -> int | None:
    """The tokens that a model can read; None: without limit. (A tokenizer without a limit says 1e30.)"""
    limits = (
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        tokenizer.model_max_length,
    )
    return min((limit for limit in limits if limit is not None and 0 < limit < 10**9), default=None)


def is_reward_adapter(path: str) -> bool:
    """Whether an adapter is that of a reward model, and not that of a causal LM."""
    config = json.loads(Path(find_adapter_config_file(path)).read_text(encoding="utf-8"))
    return config.get("task_type") == "SEQ_CLS"


def load_reward_model(
    path: str,
    dtype: torch.dtype | str,
    new_head: bool = False,
    trainable: bool = False,
    revision: str | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a directory, a PEFT adapter's directory, or a hub name (of a revision).

    new_head: any model is taken; one without a head of one number gets it, with random weights. Without
    it such a model is refused. trainable: an adapter is loaded to be trained. Raises ModelError."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
        base, is_adapter = base_of(path, revision)
        hub = {"revision": None if is_adapter else revision}
        if not new_head and not is_adapter:
            _check_head(path, config)
        brought = load_peft_weights(path, device="cpu") if is_adapter else {}

        def may_miss(model: Any, key: str) -> bool:
            """A head may be new, or be brought by the adapter."""
            if key.split(".")[0] not in head_names(model):
                return False
            return any(name.endswith(key) for name in brought) if is_adapter else new_head

        kind = AutoModelForSequenceClassification
        model = load_weights(kind, base, may_miss, dtype=dtype, num_labels=1, **hub)
        tokenizer = load_tokenizer(path, path, **hub)
        if is_adapter:
            model = load_adapter(model, path, trainable, revision)
    except UserError:
        raise
    except Exception as error:  # what the libraries raise for a folder that is no model has no list
        raise ModelError(f"reward model {path} cannot be loaded: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise ModelError(f"reward model {path}: it has no fast tokenizer (tokenizer.json)")
    # an adapter's own is not its base's
    model.config.reward_question = config.get("reward_question")
    model.config.reward_step_token = config.get("reward_step_token", config.get("step_token"))
    for name in {"step_token", "running_min"} & vars(model.config).keys():  # it is no PRM any more
        delattr(model.config, name)
    return with_padding(model, tokenizer), tokenizer


def head_names(model: Any) -> list[str]:
    """The names of the modules on top of a model's backbone."""
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def _check_head(path: str, config: dict) -> None:
    """Raises ModelError for a model that gives something else than one number a text."""
    kinds = config.get("architectures") or []
    if not any(kind.endswith(("ForSequenceClassification", "RewardModel")) for kind in kinds):
        made = f"`python train.py reward --model_name_or_path {path}` makes one of it"
        raise ModelError(
            f"{path} is no reward model but {', '.join(kinds) or 'of no kind that its config.json names'}; {made}"
        )
    labels = len(config.get("id2label") or [0] * config.get("num_labels", 2))
    if labels != 1:
        raise ModelError(f"{path} is a classifier with {labels} labels; a reward model has one")


class _EncodedPair(list):
    """The ids of a pair, and which pair it is."""

    def __init__(self, ids: list[int], place: int):
        super().__init__(ids)
        self.place = place


class ResponseRewardModel(ResponseScorer):
    """A ResponseScorer on a reward model: one of this project's, or any of the hub's for sequence classification with one label.

    path: a model directory, a PEFT adapter directory or a hub name. batch_tokens: padded tokens of one forward pass (a longer text
    is read alone). device: by default the GPU if there is one; the weights are in float32 on a CPU and as stored on a GPU. Code
    that comes with a model is never run. Scores are as the model gives them, without bounds; what is batched together moves them
    by rounding errors only. `cut` counts the texts that did not fit into the model's context and were scored without the
    beginning of their prompts. Raises JudgeError if the model cannot be used."""

    def __init__(self, path: str | Path, batch_tokens: int = 8192, device: str | None = None):
        self.path, self.batch_tokens, self.cut = str(path), batch_tokens, 0
        if batch_tokens < 1:
            raise JudgeError(f"batch_tokens must be at least 1, got {batch_tokens}")
        device, dtype = scoring_device(device)
        model, tokenizer = load_reward_model(self.path, dtype)
        self.model = model.to(device, model.dtype).eval()  # peft keeps what it trained in float32
        self.device = self.model.device
        self.format = ResponseTokens(
            tokenizer, longest(self.model, tokenizer), *format_of(self.model)
        )
        self.pad_token_id = self.model.config.get_text_config().pad_token_id or 0

    def score(self, pairs: Sequence[Response], progress: str | None = None) -> list[float]:
        """As in ResponseScorer; progress: the label of a progress bar."""
        from tqdm import tqdm

        encoded = self.format.encode(pairs)
        self.cut += sum(over > 0 for _, over in encoded)
        scores = [0.0] * len(pairs)
        with tqdm(
            total=len(pairs), desc=progress, unit="response", disable=progress is None
        ) as bar:
            for batch in batches_by_length(
                [_EncodedPair(ids, place) for place, (ids, _) in enumerate(encoded)],
                self.batch_tokens,
            ):
                for row, score in zip(batch, self._scores(batch), strict=True):
                    if score != score:
                        raise JudgeError(
                            f"reward model {self.path}: its score of {short(pairs[row.place][1])} is not a number"
                        )
                    scores[row.place] = score
                bar.update(len(batch))
        return scores

    @torch.inference_mode()
    def _scores(self, batch: list[_EncodedPair]) -> list[float]:
        # (B, L), right-padded
        ids = torch.full((len(batch), max(map(len, batch))), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for b, row in enumerate(batch):
            ids[b, : len(row)], mask[b, : len(row)] = torch.tensor(row), 1
        try:
            output = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        except torch.OutOfMemoryError:
            fits = f"{ids.numel()} tokens at once do not fit on the GPU: lower batch_tokens"
            raise JudgeError(f"reward model {self.path}: {fits}") from None
        return output.logits[:, 0].float().tolist()

    def close(self) -> None:
        """Give the model's memory back."""
        self.model = None

    def __str__(self) -> str:
        return f"{self.path}: a response reward model, context {self.format.max_length or 'without limit'}, on {self.device}"


class ResponseJudge(StepJudge):
    """A ResponseScorer where a StepJudge is asked for: every step of a solution gets sigmoid of the score of the whole, as outcome
    rewards do. Of a beginning that is the score of a response that was not finished."""

    def __init__(self, scorer: ResponseScorer):
        self.scorer = scorer

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> list[list[float] | None]:
        asked = [
            len(steps) - first
            for (_, steps), first in zip(solutions, skip or [0] * len(solutions), strict=True)
        ]
        texts = [
            (prompt, "\n".join(steps))
            for (prompt, steps), count in zip(solutions, asked, strict=True)
            if count
        ]
        scores = iter(
            torch.tensor(self.scorer.score(texts), dtype=torch.float64).sigmoid().tolist()
        )
        return [[next(scores)] * count if count else [] for count in asked]

    def close(self) -> None:
        self.scorer.close()

    def __str__(self) -> str:
        return str(self.scorer)
