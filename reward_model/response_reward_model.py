"""The response reward model: one number for a whole response to a prompt; higher is better.

For two responses to one prompt, sigmoid(r_a - r_b) is the probability that a is the better one
(Bradley and Terry 1952).

    Problem: 2 + 3 + 4 = ?
    Solution:
    Step 1: 2 + 3 = 5
    Step 2: 5 + 4 = 9
    Answer: 9
    Right?

`ResponseTokens` turns text into ids, for training (trainer/reward_trainer.py) and for scoring. The
question at the end is there only for a model that was trained with it; its config.json names the
question: "reward_question": "Right?". A model that was initialized from a PRM reads a step token
before every step, as the PRM did, and names that token: "reward_step_token": "<next>".

A reward model is a plain directory for sequence classification with one label, the usual form of
published reward models; any such model of the hub can be used.
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

from common.cli import here, training_flags
from common.errors import JudgeError, ModelError, UserError, first_line, short
from common.progress import Bar, taking_long
from lm.chat_template import render_chat
from lm.known_words import tokens_of
from lm.loading import (
    base_of,
    check_adapter,
    check_embeddings,
    in_one_dtype,
    load_adapter,
    load_tokenizer,
    load_weights,
    scoring_device,
)
from lm.prompting import PLAIN_TEMPLATE, is_chat
from lm.text_encoding import TextEncoder, batches_by_length
from reasoning.steps import split_steps
from reward_model.prm_formats import StepTokens
from reward_model.process_reward_model import head_names, with_zero_head
from reward_model.protocols import (
    Response,
    ResponseScorer,
    Scores,
    Solution,
    StepJudge,
    check_positive,
    with_skip,
)


class ResponseTokens:
    """How a reward model reads a prompt and a response.

    max_length: in tokens, None for no limit. question: the text after the response. step_token: the
    token before each step, for a model that was initialized from a PRM.

    A chat model reads both in its own template, as a user's message and the answer; an encoder
    (BERT and similar) as two sentences, `[CLS] prompt [SEP] response [SEP]`; any other model in the
    plain template of lm/text_encoding.py, followed by the question or an end-of-text token. Control
    tokens in the two texts are read as plain text."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int | None = None,
        question: str | None = None,
        step_token: str | None = None,
    ):
        self.tokenizer, self.max_length, self.question = tokenizer, max_length, question
        self.steps = StepTokens(tokenizer, step_token) if step_token else None
        self.encoder = self.steps.encoder if self.steps else TextEncoder(tokenizer)
        self.is_chat = is_chat(tokenizer)
        has_pairs = None not in (tokenizer.cls_token_id, tokenizer.sep_token_id)
        self.is_pair = has_pairs and not (self.is_chat or self.steps)
        is_plain = not (self.is_chat or self.is_pair or self.steps or question)
        self.ends_with_eos = is_plain and tokenizer.eos_token_id is not None

    def encode(self, pairs: Sequence[Response]) -> list[tuple[list[int], int]]:
        """(ids, number of tokens that max_length cut off) of every (prompt, response).

        A text that is too long loses tokens at its start, so the start of the prompt goes first;
        BOS stays. Raises ModelError for text that is not Unicode."""
        guarded = [self.encoder.guard(prompt, [response]) for prompt, response in pairs]
        leading, end = self.encoder.leading_ids, list[int]()
        if self.is_pair:
            between, end = self._frame()
            prompts = self.encoder.ids([prompt for prompt, _ in guarded])
            responses = self.encoder.ids([response for _, (response,) in guarded])
            texts = [[*p, *between, *r] for p, r in zip(prompts, responses, strict=True)]
        else:
            texts = self.encoder.ids(
                [self.text(prompt, response) for prompt, (response,) in guarded]
            )
            if self.is_chat:  # a chat template writes the special tokens itself
                leading = leading if texts and texts[0][: len(leading)] == leading else []
                texts = [ids[len(leading) :] for ids in texts]
            elif self.ends_with_eos:
                end = [self.tokenizer.eos_token_id]
        encoded = []
        for text in texts:
            ids = [*leading, *text, *end]
            over = max(0, len(ids) - (self.max_length or len(ids)))
            encoded.append((ids[: len(leading)] + ids[len(leading) + over :], over))
        return encoded

    def text(self, prompt: str, response: str) -> str:
        """The text of both, but for an encoder and for an end-of-text token."""
        if self.steps:
            return self.steps.text(prompt, split_steps(response))
        if self.is_chat:
            return render_chat(self.tokenizer, [("user", prompt), ("assistant", response)])
        question = f"\n{self.question}" if self.question else ""
        return PLAIN_TEMPLATE.replace("{prompt}", prompt) + response + question

    def _frame(self) -> tuple[list[int], list[int]]:
        """The ids that an encoder's tokenizer puts between two sentences and after them."""
        (a,), whole = self.encoder.ids(["a"]), self.tokenizer("a", "a")["input_ids"]
        first = len(self.encoder.leading_ids) + len(a)
        second = whole.index(a[0], first)
        return whole[first:second], whole[second + len(a) :]


def from_causal_lm(model: Any, tokenizer: Any, question: str = "") -> Any:
    """An untrained reward model: a head on the backbone of a causal LM, shared and not copied.

    With a question (and without a chat template) the head starts as the LM's logit of "Yes" minus
    that of "No" after the question, if each word is one token. Otherwise it starts as zeros."""
    config = copy.deepcopy(model.config)
    config.num_labels, config.use_cache = 1, False
    if question and not is_chat(tokenizer):
        config.reward_question = question
    reward_model = with_zero_head(AutoModelForSequenceClassification, model, config)
    if hasattr(config, "reward_question"):
        texts = [f"{question} {word}" for word in ("Yes", "No")]
        yes, no = (tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in texts)
        rows = model.get_output_embeddings().weight
        are_words = [tokenizer.decode([index]).strip() for index in (yes, no)] == ["Yes", "No"]
        weight = next(reward_model.get_submodule(head_names(reward_model)[0]).parameters())
        if are_words and weight.shape[1:] == rows.shape[1:]:
            weight.data[0] = rows[yes].detach() - rows[no].detach()
    return with_padding(reward_model, tokenizer)


def with_padding(model: Any, tokenizer: Any) -> Any:
    """The model, with a padding token in its config: LLaMA and similar models read the score at the
    last token that is not padding."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        has_embedding = pad is not None and pad < model.get_input_embeddings().weight.shape[0]
        config.pad_token_id = pad if has_embedding else eos
    return model


def format_of(model: Any) -> tuple[str | None, str | None]:
    """(question, step token) that a reward model was trained with."""
    names = ("reward_question", "reward_step_token")
    question, step_token = (getattr(model.config, name, None) for name in names)
    return question, step_token


def longest(model: Any, tokenizer: Any) -> int | None:
    """The most tokens that a model can read; None: without limit."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = (context, tokenizer.model_max_length)
    # a tokenizer without a limit has 1e30
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

    new_head: accept any model; one without a head of one number gets such a head, with random
    weights. Otherwise a model without it is refused. trainable: an adapter is loaded to be trained.
    Raises ModelError."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
        base, is_adapter = base_of(path, revision)
        hub: dict[str, Any] = {"revision": None if is_adapter else revision}
        if not new_head and not is_adapter:
            _check_head(path, config)
        adapter_weights = {}
        if is_adapter:
            check_adapter(path, revision)
            adapter_weights = load_peft_weights(path, device="cpu", revision=revision)

        def may_miss(model: Any, key: str) -> bool:
            """The head may be missing if it is new, or if the adapter has it."""
            if key.split(".")[0] not in head_names(model):
                return False
            return any(name.endswith(key) for name in adapter_weights) if is_adapter else new_head

        kind = AutoModelForSequenceClassification
        with taking_long(f"loading {path}"):
            model = load_weights(kind, base, may_miss, dtype=dtype, num_labels=1, **hub)
        tokenizer = load_tokenizer(path, **hub)
        check_embeddings(tokenizer, model)
        if is_adapter:
            model = load_adapter(model, path, trainable, revision)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # the libraries raise many kinds of errors for a folder without a model
        raise ModelError(f"reward model {path} cannot be loaded: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise ModelError(f"reward model {path}: it has no fast tokenizer (tokenizer.json)")
    # those of `path`: an adapter's base has others
    model.config.reward_question = config.get("reward_question")
    model.config.reward_step_token = config.get("reward_step_token", config.get("step_token"))
    for name in {"step_token", "running_min"} & vars(model.config).keys():
        delattr(model.config, name)  # only a PRM has these
    return with_padding(model, tokenizer), tokenizer


def _check_head(path: str, config: dict) -> None:
    """Raises ModelError for a model that does not give one number for a text."""
    kinds = config.get("architectures") or []
    if not any(kind.endswith(("ForSequenceClassification", "RewardModel")) for kind in kinds):
        found = ", ".join(kinds) or "a model whose config.json names no architecture"
        command = here("python train.py reward", *training_flags(path))
        raise ModelError(f"{path} is no reward model but {found}; `{command}` makes one of it")
    labels = len(config.get("id2label") or [0] * config.get("num_labels", 2))
    if labels != 1:
        raise ModelError(f"{path} is a classifier with {labels} labels; a reward model has one")


class ResponseRewardModel(ResponseScorer):
    """A ResponseScorer on a reward model: any model for sequence classification with one label.

    path: a model directory, a PEFT adapter directory or a hub name. batch_tokens: padded tokens of
    one forward pass (a longer text is read alone). device: by default the GPU if there is one; the
    dtype is that of `scoring_device`. Code that comes with a model is never run. Raises ModelError
    if the model cannot be loaded.

    Scores are the model's own, without bounds; the composition of a batch changes them by rounding
    errors only. `cut` counts the texts that were longer than the model's context and were scored
    without the start of their prompts."""

    def __init__(self, path: str | Path, batch_tokens: int = 8192, device: str | None = None):
        self.path, self.batch_tokens, self.cut = str(path), batch_tokens, 0
        check_positive(batch_tokens=batch_tokens)
        device, dtype = scoring_device(device)
        model, tokenizer = load_reward_model(self.path, dtype)
        self.model = in_one_dtype(model, device).eval()
        self.device = self.model.device
        context = longest(self.model, tokenizer)
        self.format = ResponseTokens(tokenizer, context, *format_of(self.model))
        self.pad_token_id = self.model.config.get_text_config().pad_token_id or 0

    def score(self, pairs: Sequence[Response], progress: str | None = None) -> list[float]:
        """As in ResponseScorer; progress: the label of a progress bar."""
        encoded = self.format.encode(pairs)
        self.cut += sum(over > 0 for _, over in encoded)
        scores = [0.0] * len(pairs)

        def length(index: int) -> int:
            return len(encoded[index][0])

        is_silent = progress is None
        with Bar(total=len(pairs), desc=progress, unit="response", disable=is_silent) as bar:
            for batch in batches_by_length(range(len(pairs)), self.batch_tokens, length):
                values = self._scores([encoded[index][0] for index in batch])
                for index, score in zip(batch, values, strict=True):
                    if score != score:
                        response = short(pairs[index][1])
                        raise JudgeError(
                            f"reward model {self.path}: its score of {response} is not a number"
                        )
                    scores[index] = score
                bar.update(len(batch))
        return scores

    @torch.inference_mode()
    def _scores(self, batch: list[list[int]]) -> list[float]:
        """The scores of texts, given as ids."""
        # (B, L), right-padded
        ids = torch.full((len(batch), max(map(len, batch))), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for b, text in enumerate(batch):
            ids[b, : len(text)], mask[b, : len(text)] = torch.tensor(text), 1
        try:
            output = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        except torch.OutOfMemoryError:
            reason = f"{ids.numel()} tokens at once do not fit on the GPU: lower batch_tokens"
            raise JudgeError(f"reward model {self.path}: {reason}") from None
        return output.logits[:, 0].float().tolist()

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """As in lm/known_words.py."""
        return tokens_of(self.format.tokenizer, texts)

    def close(self) -> None:
        """Release the model's memory."""
        self.model = None

    def __str__(self) -> str:
        context = self.format.max_length or "without limit"
        return f"{self.path}: a response reward model, context {context}, on {self.device}"


class ResponseJudge(StepJudge):
    """A ResponseScorer used as a StepJudge: every step gets sigmoid(score of the whole solution).

    This is an outcome reward, as opposed to a process reward. A prefix is scored as an unfinished
    response."""

    def __init__(self, scorer: ResponseScorer):
        self.scorer = scorer

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> Scores:
        counts: list[int | None] = []
        texts: list[Response] = []
        for prompt, steps, first in with_skip(solutions, skip):
            counts.append(len(steps) - first if self.can_read(prompt, steps) else None)
            if counts[-1]:
                texts.append((prompt, "\n".join(steps)))
        rewards = torch.tensor(self.scorer.score(texts), dtype=torch.float64)
        scores = iter(rewards.sigmoid().tolist())
        return [
            None if count is None else [next(scores)] * count if count else [] for count in counts
        ]

    def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        return self.scorer.count_tokens(texts)

    def close(self) -> None:
        self.scorer.close()

    def __str__(self) -> str:
        return str(self.scorer)
