"""The process reward model (PRM): values of all steps of a solution, in one forward pass.

    Problem: 2 + 3 + 4 = ?
    Solution:
    <next>Step 1: 2 + 3 = 5
    <next>Step 2: 5 + 4 = 9

`<next>` is a special token before every step. The value of a step is the sigmoid of the model's one
logit at the step's last token, its closing newline. There is no end-of-text token. Training
(trainer/prm_trainer.py) and scoring read the same text.

A PRM is a plain directory for token classification (or a PEFT adapter on a causal LM) whose
config.json names its step token: "step_token": "<next>". If its labels were relative (how much of
the value before a step the step keeps), it also has "running_min": true; the score of a step is
then the least value so far, which says whether all steps up to it are right. Published PRMs are
read in their own formats: reward_model/prm_formats.py.
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

from common.cli import here, training_flags
from common.errors import JudgeError, ModelError, UserError, first_line
from common.progress import taking_long
from lm.known_words import tokens_of
from lm.loading import (
    base_of,
    check_embeddings,
    in_one_dtype,
    load_adapter,
    load_tokenizer,
    load_weights,
    scoring_device,
)
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
from reward_model.protocols import Scores, Solution, StepJudge, check_positive, nan_error, with_skip

PACKED = 512  # the most tokens of a row that holds several solutions
KEPT_BYTES = 1 << 30  # the most bytes for caches of prefixes; the oldest are dropped first


def add_step_token(model: Any, tokenizer: Any, step_token: str = STEP_TOKEN) -> None:
    """Add the step token to the tokenizer and its embedding, the mean of all others, to a model."""
    new = step_token not in tokenizer.get_vocab()
    if new:
        token = AddedToken(step_token, special=True, normalized=False)
        tokenizer.add_tokens([token], special_tokens=True)
    rows = model.get_input_embeddings().num_embeddings
    index = tokenizer.convert_tokens_to_ids(step_token)
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if new or index >= rows:
        weight = model.get_input_embeddings().weight.data
        weight[index] = weight[: min(index, rows)].float().mean(0).to(weight.dtype)


def from_causal_lm(model: Any, tokenizer: Any, step_token: str = STEP_TOKEN) -> Any:
    """An untrained PRM on the backbone of a causal LM; its head is zero, so every value is 0.5.

    The backbone is shared with `model`, not copied."""
    config = copy.deepcopy(model.config)
    config.num_labels, config.classifier_dropout, config.use_cache = 1, 0.0, False
    config.step_token = step_token
    prm = with_zero_head(AutoModelForTokenClassification, model, config)
    add_step_token(prm, tokenizer, step_token)
    return prm


def with_zero_head(model_class: Any, model: Any, config: Any) -> Any:
    """A model of another class on the backbone of `model`, not a copy, with a head of zeros."""
    with torch.device("meta"):
        made = model_class.from_config(config, dtype=model.dtype, trust_remote_code=False)
    setattr(made, made.base_model_prefix, model.base_model)
    for name in head_names(made):
        head = made.get_submodule(name).to_empty(device=model.device)
        for weight in head.parameters():
            torch.nn.init.zeros_(weight)
    return made


def head_names(model: Any) -> list[str]:
    """The names of the modules on top of a model's backbone."""
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def load_prm(
    path: str, dtype: torch.dtype | str, trainable: bool = False, revision: str | None = None
) -> tuple[Any, PRMFormat]:
    """(model, its format with the tokenizer) of a PRM in any known format.

    path: a directory, a PEFT adapter's directory or a hub name. trainable: an adapter is loaded to
    be trained. Raises ModelError."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
        family = _family(path, config)
        base, is_adapter = base_of(path, revision) if "step_token" in config else (path, False)
        tokenizer = load_tokenizer(path, revision=revision)
        with taking_long(f"loading {path}"):
            if is_adapter:
                model = _adapter_base(base, tokenizer, config["step_token"], dtype)
                model = load_adapter(model, path, trainable, revision)
            else:
                model = load_weights(family.model_class, path, dtype=dtype, revision=revision)
        check_embeddings(tokenizer, model)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # the libraries raise many kinds of errors for a folder without a model
        raise ModelError(f"PRM {path} cannot be loaded: {first_line(error)}") from None
    model.config.running_min = config.get("running_min", False)  # missing in an adapter's base
    if not tokenizer.is_fast:
        raise ModelError(f"PRM {path}: it has no fast tokenizer (tokenizer.json)")
    try:
        prm_format = family(tokenizer, config.get("step_token"))
    except ModelError as error:
        raise ModelError(f"PRM {path}: {error}") from None
    labels = model.config.num_labels
    if family is StepTokens and labels != 1:
        raise ModelError(f"PRM {path}: expected a head of one number a token, got {labels}")
    return model, prm_format


def _family(path: str, config: dict) -> type[PRMFormat]:
    """The format of a PRM, by config.json or else by the model's name."""
    if not config:
        raise ModelError(f"PRM {path}: there is no config.json, neither here nor on the hub")
    if "step_token" in config:
        return StepTokens
    for family in PUBLISHED.values():
        if family.matches(Path(path).name, config):
            return family
    raise ModelError(
        f"{path} is no process reward model: its config.json names no step_token, and neither that "
        f"file nor the name fits one of {', '.join(PUBLISHED)}; "
        f"`{here('python train.py prm', *training_flags(path))}` makes a PRM of it"
    )


def _adapter_base(base: str, tokenizer: Any, step_token: str, dtype: torch.dtype | str) -> Any:
    """The model that an adapter was trained on: a PRM, or a causal LM made into one."""
    if PreTrainedConfig.get_config_dict(base)[0].get("step_token"):
        return load_weights(AutoModelForTokenClassification, base, dtype=dtype)
    model = load_weights(AutoModelForCausalLM, base, dtype=dtype)
    return from_causal_lm(model, tokenizer, step_token)


@dataclass
class _SolutionText:
    """A solution to read."""

    solution: int  # its index
    ids: list[int]
    places: list[int]  # the positions of the values to read, all after `past`
    skip: int  # this many first values were not asked for
    past: CachedPrefix | None  # its prefix, if that was read before
    is_prefix: bool  # its cache is kept for the steps that may follow


@dataclass
class _PackedRow:
    """Solutions of one prompt to read together: a tree of tokens (lm/tree_attention.py).

    past: the cached prefix that all of them continue. reads: each text with the places of its
    tokens in the row."""

    past: CachedPrefix | None
    ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    reads: list[tuple[_SolutionText, list[int]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.past or ()) + len(self.ids)

    def value_places(self) -> Iterator[int]:
        """The places in the row where values are read, text by text."""
        for text, path in self.reads:
            yield from (path[place - len(self.past or ())] for place in text.places)


class ProcessRewardModel(StepJudge):
    """A StepJudge on a process reward model of any format in reward_model/prm_formats.py.

    path: a model directory, a PEFT adapter directory or a hub name. batch_tokens: padded tokens of
    one forward pass (a longer solution is read alone). device: by default the GPU if there is one;
    the dtype is that of `scoring_device`. Code that comes with a model is never run. Raises
    ModelError if the model cannot be loaded.

    A score is rounded to 6 decimals and does not depend on later steps; the composition of a batch
    changes it by rounding errors only. The cache of an unfinished solution is kept, so that a later
    call about the steps that follow it (`skip`) reads only these."""

    unscored_reason = "longer than the PRM's context"

    def __init__(self, path: str | Path, batch_tokens: int = 8192, device: str | None = None):
        self.path, self.batch_tokens = str(path), batch_tokens
        check_positive(batch_tokens=batch_tokens)
        device, dtype = scoring_device(device)
        model, self.format = load_prm(self.path, dtype)
        self.model = in_one_dtype(model, device).eval()
        self.device = self.model.device
        config = self.model.config
        self.running_min = config.running_min
        # tokens; None: without limit
        self.context_length = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.shares_prefixes = supports_tree_attention(self.model, PACKED)
        # Texts in one row read their common start once, but each token then attends to the whole
        # row. With a hidden size of h this costs 4 h PACKED operations a token and layer, beside
        # the 24 h^2 of the weights. So a larger part than PACKED / (6 h) has to be shared.
        hidden_size = config.get_text_config().hidden_size
        self.least_shared = min(0.5, PACKED / (6 * hidden_size))
        # for each batch: its kept prefixes by their ids, and the bytes of its cache
        self._kept: deque[tuple[dict[tuple[int, ...], CachedPrefix], int]] = deque()

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> Scores:
        """As in StepJudge."""
        results: Scores = [[] for _ in solutions]
        requests = list(with_skip(solutions, skip))
        asked = []
        for i, (prompt, steps, first) in enumerate(requests):
            if not self.can_read(prompt, steps):
                results[i] = None
            elif first < len(steps):
                asked.append(i)
        encoded = self.format.encode([solutions[i] for i in asked])
        texts: list[_SolutionText] = []
        for i, (ids, places) in zip(asked, encoded, strict=True):
            if self.context_length and len(ids) > self.context_length:
                results[i] = None
                continue
            _, steps, first = requests[i]
            past = self._find_past(ids[: places[first - 1] + 1]) if first else None
            # the least value so far needs all values, unless a past has it
            start = first if past or not self.running_min else 0
            is_prefix = self.shares_prefixes and not ends_solution(list(steps))
            texts.append(_SolutionText(i, ids, places[start:], first - start, past, is_prefix))
        rows = self._rows(texts)
        for has_past in (False, True):
            alike = [row for row in rows if (row.past is not None) == has_past]
            for batch in batches_by_length(alike, self.batch_tokens):
                self._score_batch(batch, solutions, results)
        return results

    def _score_batch(
        self, batch: list[_PackedRow], solutions: Sequence[Solution], results: Scores
    ) -> None:
        """Read a batch, put the scores of its solutions into `results` and keep its prefixes."""
        values, cache = self._values(batch)
        kept: list[tuple[int, _SolutionText, list[int], float]] = []
        for b, row in enumerate(batch):
            for text, path in row.reads:
                scores = [round(next(values), 6) for _ in text.places]
                broken = next((k for k, value in enumerate(scores) if value != value), None)
                if broken is not None:
                    prompt, steps = solutions[text.solution]
                    step = len(steps) - len(scores) + broken
                    raise nan_error(f"PRM {self.path}", prompt, steps, step)
                if self.running_min:
                    before = text.past.score if text.past else 1.0
                    scores = list(accumulate(scores, min, initial=before))[1:]
                results[text.solution] = scores[text.skip :]
                if text.is_prefix:
                    kept.append((b, text, path, scores[-1]))
        if cache is not None and kept:
            self._keep(batch, cache, kept)

    def _rows(self, texts: list[_SolutionText]) -> list[_PackedRow]:
        """Put texts with a common prefix into one row of at most PACKED tokens.

        Texts share a row if they continue the same past, or if they share more than `least_shared`
        of their tokens. With a shorter prefix, attention over the row costs more than it saves."""
        rows: list[_PackedRow] = []
        path: list[int] = []
        before: list[int] = []
        most = min(PACKED, self.batch_tokens)
        for text in sorted(texts, key=lambda text: text.ids):
            ids = text.ids[len(text.past or ()) :]
            shared, fits = 0, False
            if rows and rows[-1].past is text.past and self.shares_prefixes:
                shared = shared_prefix(before, ids)
                fits = len(rows[-1]) + len(ids) - shared <= most
            if not fits or not (text.past or shared > self.least_shared * len(ids)):
                rows.append(_PackedRow(text.past))
                shared = 0
            row = rows[-1]
            path, before = add_sequence(row.ids, row.parents, path, ids, shared), ids
            row.reads.append((text, path))
        return rows

    @torch.inference_mode()
    def _values(self, batch: list[_PackedRow]) -> tuple[Iterator[float], Cache | None]:
        """The values that are to be read, row by row, and the batch's cache if it is needed."""
        pasts = [row.past for row in batch if row.past is not None]
        ids, parents = [row.ids for row in batch], [row.parents for row in batch]
        inputs = tree_inputs(ids, parents, 0, pasts, mask_dtype(self.model))
        asked = [(b, place) for b, row in enumerate(batch) for place in row.value_places()]
        rows, places = torch.tensor(asked, device=self.device).T
        has_prefixes = any(text.is_prefix for row in batch for text, _ in row.reads)
        cache = stack_caches(pasts) if pasts or has_prefixes else None
        try:
            inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
            options = {"past_key_values": cache, "use_cache": cache is not None}
            log_odds = self.format.log_odds(self.model, rows, places, **inputs, **options)
            values = log_odds.float().sigmoid().tolist()
        except torch.OutOfMemoryError:
            tokens = inputs["input_ids"].numel()
            reason = f"{tokens} tokens at once do not fit on the GPU: lower batch_tokens"
            raise JudgeError(f"PRM {self.path}: {reason}") from None
        return iter(values), cache

    # --- kept prefixes

    def _find_past(self, ids: list[int]) -> CachedPrefix | None:
        """The kept prefix with these ids, if there is one."""
        key = tuple(ids)
        return next((kept[key] for kept, _ in self._kept if key in kept), None)

    def _keep(
        self,
        batch: list[_PackedRow],
        cache: Cache,
        texts: Sequence[tuple[int, _SolutionText, list[int], float]],
    ) -> None:
        """Keep the prefixes of a batch: (its row, the text, the places of its tokens in the row,
        the score of its last step)."""
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        # the column of the first token after the longest past
        first = cache.get_seq_length() - max(len(row.ids) for row in batch)
        kept: dict[tuple[int, ...], CachedPrefix] = {}
        for b, text, path, score in texts:
            past = len(text.past or ())  # tokens, which end at column `first`
            end = text.places[-1] + 1
            own = (first + place for place in path[: end - past])
            columns = [*range(first - past, first), *own]
            kept[tuple(text.ids[:end])] = CachedPrefix(layers, b, columns, score)
        self._kept.append((kept, sum(keys.nbytes + values.nbytes for keys, values in layers)))
        while sum(size for _, size in self._kept) > KEPT_BYTES:
            self._kept.popleft()

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """As in lm/known_words.py."""
        return tokens_of(self.format.tokenizer, texts)

    def close(self) -> None:
        """Release the model's memory."""
        self.model = None
        self._kept.clear()

    def __str__(self) -> str:
        name, context = type(self.format).__name__, self.context_length or "without limit"
        return f"{self.path}: a PRM ({name}), context {context}, on {self.device}"
