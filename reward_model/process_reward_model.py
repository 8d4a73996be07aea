"""The process reward model (PRM): what every step of a solution is worth, all of them in one forward pass.

    Problem: 2 + 3 + 4 = ?
    Solution:
    <next>Step 1: 2 + 3 = 5
    <next>Step 2: 5 + 4 = 9

`<next>` is a special token before every step; the value of a step is the sigmoid of the model's one logit at the step's last token,
its closing newline. There is no end-of-text token. The same text is learned from (trainer/prm_trainer.py) and scored here.

A PRM is a plain directory for token classification (or a PEFT adapter on a causal LM) whose config.json names its step token:
"step_token": "<next>". Where the labels said what a step keeps of the value before it, it also says "running_min": true: the score
of a step is then the least value so far, which tells whether all is right up to there. PRMs that others published are read in their
own formats: reward_model/prm_formats.py.
"""

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedConfig
from transformers.cache_utils import Cache

from common.errors import JudgeError, ModelError, UserError, first_line
from lm.loading import base_of, load_adapter, load_tokenizer, load_weights, scoring_device
from lm.text_encoding import batches_by_length
from lm.tree_attention import (
    CachedPrefix,
    add_sequence,
    mask_dtype,
    stack_caches,
    supports_tree_attention,
    tree_inputs,
)
from reasoning.steps import ends_solution, shared_prefix
from reward_model.prm_formats import PUBLISHED, STEP_TOKEN, PRMFormat, StepTokens
from reward_model.protocols import Solution, StepJudge, describe_step

PACKED = 512  # tokens of a row that holds several solutions, at most
KEPT_BYTES = 1 << 30  # what the caches of beginnings may take; the oldest go first


def add_step_token(model, tokenizer, step_token: str = STEP_TOKEN) -> None:
    """The tokenizer gets the step token, the model a row of its embeddings for it, the mean of all rows before it."""
    new = step_token not in tokenizer.get_vocab()
    if new:
        tokenizer.add_tokens(
            [AddedToken(step_token, special=True, normalized=False)], special_tokens=True
        )
    rows, index = (
        model.get_input_embeddings().num_embeddings,
        tokenizer.convert_tokens_to_ids(step_token),
    )
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if new or index >= rows:
        weight = model.get_input_embeddings().weight.data
        weight[index] = weight[: min(index, rows)].float().mean(0).to(weight.dtype)


def from_causal_lm(model, tokenizer, step_token: str = STEP_TOKEN):
    """A PRM that has learned nothing yet: the backbone of a causal LM, which it takes over, and a head of zeros:
    every value is .5."""
    config = copy.deepcopy(model.config)
    config.num_labels, config.classifier_dropout, config.use_cache = 1, 0.0, False
    config.step_token = step_token
    with torch.device("meta"):
        prm = AutoModelForTokenClassification.from_config(config, dtype=model.dtype)
    backbone = prm.base_model_prefix
    setattr(prm, backbone, model.base_model)
    for name, module in prm.named_children():
        if name != backbone:
            module.to_empty(device=model.device)
            for weight in module.parameters():
                torch.nn.init.zeros_(weight)
    add_step_token(prm, tokenizer, step_token)
    return prm


def load_prm(
    path: str, dtype: torch.dtype | str, trainable: bool = False, revision: str | None = None
) -> tuple[Any, PRMFormat]:
    """(model, its format with the tokenizer) of a PRM of any known family: a directory, an adapter or
    a hub name. trainable: an adapter is loaded to be trained. Raises ModelError."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
        family, options = _family(path, config)
        base, is_adapter = base_of(path, revision) if "step_token" in config else (path, False)
        tokenizer = load_tokenizer(path, path, revision=revision)
        if is_adapter:
            model = _adapter_base(base, tokenizer, config["step_token"], dtype)
            model = load_adapter(model, path, trainable, revision)
        else:
            model = load_weights(family.model_class, path, dtype=dtype, revision=revision)
    except UserError:
        raise
    except Exception as error:  # what the libraries raise for a folder that is no model has no list
        raise ModelError(f"PRM {path} cannot be loaded: {first_line(error)}") from None
    model.config.running_min = config.get("running_min", False)  # an adapter's base does not know
    if not tokenizer.is_fast:
        raise ModelError(f"PRM {path}: it has no fast tokenizer (tokenizer.json)")
    try:
        form = family(tokenizer, **options)
    except JudgeError as error:
        raise ModelError(f"PRM {path}: {error}") from None
    labels = model.config.num_labels
    if isinstance(form, StepTokens) and labels != 1:
        raise ModelError(f"PRM {path}: expected a head of one number a token, got {labels}")
    return model, form


def _family(path: str, config: dict) -> tuple[type[PRMFormat], dict]:
    """The format that a PRM's config.json asks for, or its name where that says nothing."""
    if not config:
        raise ModelError(f"PRM {path}: there is no config.json, or none to be had from the hub")
    if "step_token" in config:
        return StepTokens, {"tag": config["step_token"]}
    for family in PUBLISHED.values():
        if family.matches(Path(path).name, config):
            return family, {}
    raise ModelError(
        f"{path} is no process reward model: its config.json names no step_token, and neither that "
        f"nor its name is that of {', '.join(PUBLISHED)}; "
        f"`python train.py prm --model_name_or_path {path}` makes one of it"
    )


def _adapter_base(base: str, tokenizer: Any, step_token: str, dtype: torch.dtype | str) -> Any:
    """The model that an adapter was trained on: a PRM, or a causal LM made into one."""
    if PreTrainedConfig.get_config_dict(base)[0].get("step_token"):
        return load_weights(AutoModelForTokenClassification, base, dtype=dtype)
    model = load_weights(AutoModelForCausalLM, base, dtype=dtype)
    return from_causal_lm(model, tokenizer, step_token)


@dataclass
class _Text:
    """A solution to be read: its ids, where the values of its steps are, how many of these are not asked for. past: its beginning,
    where that was read before, and the values behind it are all that is read. is_prefix: it is a beginning itself."""

    solution: int
    ids: list[int]
    places: list[int]
    skip: int
    past: CachedPrefix | None
    is_prefix: bool


@dataclass
class _PackedRow:
    """Solutions of one prompt, to be read together: a tree of tokens (lm/tree_attention.py), behind a past that all of them
    have; and where the tokens of each lie."""

    past: CachedPrefix | None
    ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    reads: list[tuple[_Text, list[int]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.past or ()) + len(self.ids)

    def asked(self) -> Iterator[int]:
        """The places where values are read, text by text."""
        for text, path in self.reads:
            yield from (path[place - len(self.past or ())] for place in text.places)


class ProcessRewardModel(StepJudge):
    """A StepJudge on a process reward model: one of this project's, or one of reward_model/prm_formats.py.

    path: a model directory, a PEFT adapter directory or a hub name. batch_tokens: padded tokens of one forward pass (a longer
    solution is read alone). device: by default the GPU if there is one; the weights are in float32 on a CPU and as stored on a
    GPU. Code that comes with a model is never run. A score is rounded to 6 decimals and does not depend on the steps behind it;
    what is batched together moves it by rounding errors only. The cache of a solution without an answer is kept: whoever asks about
    the steps that follow (`skip`) pays for these alone. Raises JudgeError if the model cannot be used."""

    unscored_reason = "longer than the PRM's context"

    def __init__(self, path: str | Path, batch_tokens: int = 8192, device: str | None = None):
        self.path, self.batch_tokens = str(path), batch_tokens
        if batch_tokens < 1:
            raise JudgeError(f"batch_tokens must be at least 1, got {batch_tokens}")
        device, dtype = scoring_device(device)
        model, self.format = load_prm(self.path, dtype)
        self.model = model.to(device, model.dtype).eval()  # peft keeps what it trained in float32
        self.device = self.model.device
        self.running_min = self.model.config.running_min
        # None: without limit
        self.context_length = getattr(
            self.model.config.get_text_config(), "max_position_embeddings", None
        )
        self.shares_prefixes = supports_tree_attention(self.model, PACKED)
        # of each batch: its texts by their ids, bytes
        self._kept: deque[tuple[dict[tuple[int, ...], CachedPrefix], int]] = deque()

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> list[list[float] | None]:
        """As in StepJudge."""
        results: list[list[float] | None] = [[] for _ in solutions]
        firsts = skip or [0] * len(solutions)
        asked = [i for i, first in enumerate(firsts) if first < len(solutions[i][1])]
        texts: list[_Text] = []
        for i, (ids, places) in zip(
            asked, self.format.encode([solutions[i] for i in asked]), strict=True
        ):
            if self.context_length and len(ids) > self.context_length:
                results[i] = None
                continue
            first = firsts[i]
            past = self._past(ids[: places[first - 1] + 1]) if first else None
            # where there is no past, the least value so far is to be found
            read = first if past or not self.running_min else 0
            is_prefix = self.shares_prefixes and not ends_solution(list(solutions[i][1]))
            texts.append(_Text(i, ids, places[read:], first - read, past, is_prefix))
        rows = self._rows(texts)
        for of_kind in (
            [row for row in rows if row.past is None],
            [row for row in rows if row.past is not None],
        ):
            for batch in batches_by_length(of_kind, self.batch_tokens):
                values, cache = self._values(batch)
                for text in (text for row in batch for text, _ in row.reads):
                    scores = [round(next(values), 6) for _ in text.places]
                    broken = next((k for k, value in enumerate(scores) if value != value), None)
                    if broken is not None:
                        prompt, steps = solutions[text.solution]
                        place = describe_step(prompt, steps, len(steps) - len(scores) + broken)
                        raise JudgeError(
                            f"PRM {self.path}: the model's logits are not finite at {place}"
                        )
                    if self.running_min:
                        scores = [
                            *accumulate(scores, min, initial=text.past.score if text.past else 1.0)
                        ][1:]
                    results[text.solution] = scores[text.skip :]
                if cache is not None:
                    self._keep(batch, cache, results)
        return results

    def _rows(self, texts: list[_Text]) -> list[_PackedRow]:
        """Texts that have their past in common, or more than a half, share a row, up to PACKED tokens; with less, attention to all
        of the row costs what reading less saves."""
        rows, path, before = [], [], []
        for text in sorted(texts, key=lambda text: text.ids):
            ids = text.ids[len(text.past or ()) :]
            row = rows[-1] if rows and rows[-1].past is text.past and self.shares_prefixes else None
            shared = shared_prefix(before, ids) if row is not None else 0
            fits = row is not None and len(row) + len(ids) - shared <= min(
                PACKED, self.batch_tokens
            )
            if not fits or not (text.past or shared > len(ids) / 2):
                row, shared = _PackedRow(text.past), 0
                rows.append(row)
            path, before = add_sequence(row.ids, row.parents, path, ids, shared), ids
            row.reads.append((text, path))
        return rows

    @torch.inference_mode()
    def _values(self, batch: list[_PackedRow]) -> tuple[Iterator[float], Cache | None]:
        """The values that were asked for, row by row, and the cache behind them if one was needed."""
        pasts = [row.past for row in batch if row.past is not None]
        ids, parents = [row.ids for row in batch], [row.parents for row in batch]
        inputs = tree_inputs(ids, parents, 0, pasts, mask_dtype(self.model))
        asked = [(b, place) for b, row in enumerate(batch) for place in row.asked()]
        rows, places = torch.tensor(asked, device=self.device).T
        cache = (
            stack_caches(pasts)
            if pasts or any(text.is_prefix for row in batch for text, _ in row.reads)
            else None
        )
        try:
            inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
            inputs |= {"past_key_values": cache, "use_cache": cache is not None}
            values = (
                self.format.log_odds(self.model, rows, places, **inputs).float().sigmoid().tolist()
            )
        except torch.OutOfMemoryError:
            tokens = inputs["input_ids"].numel()
            raise JudgeError(
                f"PRM {self.path}: {tokens} tokens at once do not fit on the GPU: lower batch_tokens"
            ) from None
        return iter(values), cache

    # --- beginnings that are kept

    def _past(self, ids: list[int]) -> CachedPrefix | None:
        """The text of these ids, if it was kept."""
        key = tuple(ids)
        return next((kept[key] for kept, _ in self._kept if key in kept), None)

    def _keep(
        self, batch: list[_PackedRow], cache: Cache, results: Sequence[list[float] | None]
    ) -> None:
        """Keep the beginnings of a batch that was just read."""
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        # columns behind the longest past
        first = cache.get_seq_length() - max(len(row.ids) for row in batch)
        kept: dict[tuple[int, ...], CachedPrefix] = {}
        for b, row in enumerate(batch):
            own = len(row.past or ())
            for text, path in row.reads:
                if text.is_prefix:
                    end = text.places[-1] + 1
                    columns = [
                        *range(first - own, first),
                        *(first + place for place in path[: end - own]),
                    ]
                    kept[tuple(text.ids[:end])] = CachedPrefix(
                        layers, b, columns, results[text.solution][-1]
                    )
        if kept:
            self._kept.append((kept, sum(keys.nbytes + values.nbytes for keys, values in layers)))
        while sum(size for _, size in self._kept) > KEPT_BYTES:
            self._kept.popleft()

    def close(self) -> None:
        """Give the model's memory back."""
        self.model = None
        self._kept.clear()

    def __str__(self) -> str:
        context = self.context_length or "without limit"
        return f"{self.path}: a PRM ({type(self.format).__name__}), context {context}, on {self.device}"
