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
own formats: reward_model/foreign_prms.py.
"""

import copy
import json
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.cache_utils import Cache
from transformers.utils import find_adapter_config_file

from reasoning.steps import ends_solution, format_prompt, shared_prefix
from reward_model.base import JudgeError, Solution, StepJudge, where
from reward_model.branches import Past, as_cache, as_inputs, graft, takes_branches
from reward_model.reading import PlainText, batches, first_line

STEP_TOKEN = "<next>"
PACKED = 512  # tokens of a row that holds several solutions, at most
KEPT_BYTES = 1 << 30  # what the caches of beginnings may take; the oldest go first


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
        begins = (
            [] if self.tokenizer.chat_template else self.plain.begins
        )  # a chat template writes what begins a text itself
        encoded = []
        for (prompt, steps), ids in zip(solutions, self.plain.ids(texts), strict=True):
            ids = begins + ids
            places = self.places(ids, len(steps))
            if len(places) != len(steps):
                raise JudgeError(
                    f"{len(places)} of {len(steps)} steps can be told apart in {where(prompt, steps, 0)}"
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


def load_prm(path: str, dtype: torch.dtype | str, trainable: bool = False):
    """(model, its format with the tokenizer) of a PRM of any known family: a directory or a hub name. Raises JudgeError.

    trainable: an adapter is loaded to be trained."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(path)
        family, options = _family(path, config)
        adapter = find_adapter_config_file(path) if "step_token" in config else None
        tokenizer = AutoTokenizer.from_pretrained(path)
        if adapter:
            model = _with_adapter(path, adapter, tokenizer, config["step_token"], dtype, trainable)
        else:
            model = _from_pretrained(family.model_class, path, dtype)
    except JudgeError:
        raise
    except (
        Exception
    ) as error:  # what a folder that is no model makes of the libraries is beyond a list
        raise JudgeError(f"PRM {path} cannot be loaded: {first_line(error)}") from None
    model.config.running_min = config.get("running_min", False)  # an adapter's base does not know
    if not tokenizer.is_fast:
        raise JudgeError(f"PRM {path}: it has no fast tokenizer (tokenizer.json)")
    try:
        form = family(tokenizer, **options)
    except JudgeError as error:
        raise JudgeError(f"PRM {path}: {error}") from None
    if isinstance(form, StepTokens) and model.config.num_labels != 1:
        raise JudgeError(
            f"PRM {path}: expected a head of one number a token, got {model.config.num_labels}"
        )
    return model, form


def _family(path: str, config: dict) -> tuple[type[PRMFormat], dict]:
    """The format that a PRM's config.json asks for, or its name where that says nothing."""
    from reward_model.foreign_prms import FOREIGN

    if not config:
        raise JudgeError(f"PRM {path}: there is no config.json, or none to be had from the hub")
    if "step_token" in config:
        return StepTokens, {"tag": config["step_token"]}
    for family in FOREIGN.values():
        if family.is_told_by(Path(path).name, config):
            return family, {}
    raise JudgeError(
        f"{path} is no process reward model: its config.json names no step_token, and neither that nor its name is that of "
        f"{', '.join(FOREIGN)}; `python train.py prm --model_name_or_path {path}` makes one of it"
    )


def _from_pretrained(model_class: type, path: str, dtype: torch.dtype | str):
    model, loading = model_class.from_pretrained(
        path, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    if loading["missing_keys"]:  # transformers fills them with random numbers
        raise ValueError(f"weights are missing, {min(loading['missing_keys'])} for one")
    return model


def _with_adapter(
    path: str, adapter: str, tokenizer, step_token: str, dtype: torch.dtype | str, trainable: bool
):
    """An adapter on what it was trained on: a PRM, or a causal LM made into one as training does."""
    from peft import PeftModel

    base = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError("its adapter_config.json names no base_model_name_or_path")
    if PreTrainedConfig.get_config_dict(base)[0].get("step_token"):
        model = _from_pretrained(AutoModelForTokenClassification, base, dtype)
    else:
        model = from_causal_lm(
            _from_pretrained(AutoModelForCausalLM, base, dtype), tokenizer, step_token
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings(
            "error", message="Found missing adapter keys"
        )  # peft would start them anew
        return PeftModel.from_pretrained(model, path, is_trainable=trainable)


@dataclass
class _Text:
    """A solution to be read: its ids, where the values of its steps are, how many of these are not asked for. past: its beginning,
    where that was read before, and the values behind it are all that is read. goes_on: it is a beginning itself."""

    solution: int
    ids: list[int]
    places: list[int]
    skip: int
    past: Past | None
    goes_on: bool


@dataclass
class _Row:
    """Solutions of one prompt, to be read together: a tree of tokens (reward_model/branches.py), behind a past that all of them
    have; and where the tokens of each lie."""

    past: Past | None
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
    """A StepJudge on a process reward model: one of this project's, or one of reward_model/foreign_prms.py.

    path: a model directory, a PEFT adapter directory or a hub name. batch_tokens: padded tokens of one forward pass (a longer
    solution is read alone). device: by default the GPU if there is one; the weights are in float32 on a CPU and as stored on a
    GPU. Code that comes with a model is never run. A score is rounded to 6 decimals and does not depend on the steps behind it;
    what is batched together moves it by rounding errors only. The cache of a solution without an answer is kept: whoever asks about
    the steps that follow (`skip`) pays for these alone. Raises JudgeError if the model cannot be used."""

    left_out = "longer than the PRM's context"

    def __init__(self, path: str | Path, batch_tokens: int = 8192, device: str | None = None):
        self.path, self.batch_tokens = str(path), batch_tokens
        if batch_tokens < 1:
            raise JudgeError(f"batch_tokens must be at least 1, got {batch_tokens}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, self.format = load_prm(self.path, torch.float32 if device == "cpu" else "auto")
        self.model = model.to(device, model.dtype).eval()  # peft keeps what it trained in float32
        self.device = self.model.device
        self.running_min = self.model.config.running_min
        self.context_length = getattr(
            self.model.config.get_text_config(), "max_position_embeddings", None
        )  # None: without limit
        self.branches = takes_branches(self.model, PACKED)
        self._kept: deque[tuple[dict[tuple[int, ...], Past], int]] = (
            deque()
        )  # of each batch: its texts by their ids, bytes

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
            read = (
                first if past or not self.running_min else 0
            )  # where there is no past, the least value so far is to be found
            goes_on = self.branches and not ends_solution(list(solutions[i][1]))
            texts.append(_Text(i, ids, places[read:], first - read, past, goes_on))
        rows = self._rows(texts)
        for of_kind in (
            [row for row in rows if row.past is None],
            [row for row in rows if row.past is not None],
        ):
            for batch in batches(of_kind, self.batch_tokens):
                values, cache = self._values(batch)
                for text in (text for row in batch for text, _ in row.reads):
                    scores = [round(next(values), 6) for _ in text.places]
                    broken = next((k for k, value in enumerate(scores) if value != value), None)
                    if broken is not None:
                        prompt, steps = solutions[text.solution]
                        place = where(prompt, steps, len(steps) - len(scores) + broken)
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

    def _rows(self, texts: list[_Text]) -> list[_Row]:
        """Texts that have their past in common, or more than a half, share a row, up to PACKED tokens; with less, attention to all
        of the row costs what reading less saves."""
        rows, path, before = [], [], []
        for text in sorted(texts, key=lambda text: text.ids):
            ids = text.ids[len(text.past or ()) :]
            row = rows[-1] if rows and rows[-1].past is text.past and self.branches else None
            shared = shared_prefix(before, ids) if row is not None else 0
            fits = row is not None and len(row) + len(ids) - shared <= min(
                PACKED, self.batch_tokens
            )
            if not fits or not (text.past or shared > len(ids) / 2):
                row, shared = _Row(text.past), 0
                rows.append(row)
            path, before = graft(row.ids, row.parents, path, ids, shared), ids
            row.reads.append((text, path))
        return rows

    @torch.inference_mode()
    def _values(self, batch: list[_Row]) -> tuple[Iterator[float], Cache | None]:
        """The values that were asked for, row by row, and the cache behind them if one was needed."""
        pasts = [row.past for row in batch if row.past is not None]
        inputs = as_inputs([row.ids for row in batch], [row.parents for row in batch], 0, pasts)
        asked = [(b, place) for b, row in enumerate(batch) for place in row.asked()]
        rows, places = torch.tensor(asked, device=self.device).T
        cache = (
            as_cache(pasts)
            if pasts or any(text.goes_on for row in batch for text, _ in row.reads)
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

    def _past(self, ids: list[int]) -> Past | None:
        """The text of these ids, if it was kept."""
        key = tuple(ids)
        return next((kept[key] for kept, _ in self._kept if key in kept), None)

    def _keep(self, batch: list[_Row], cache: Cache, results: Sequence[list[float] | None]) -> None:
        """Keep the beginnings of a batch that was just read."""
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        first = cache.get_seq_length() - max(
            len(row.ids) for row in batch
        )  # columns behind the longest past
        kept: dict[tuple[int, ...], Past] = {}
        for b, row in enumerate(batch):
            own = len(row.past or ())
            for text, path in row.reads:
                if text.goes_on:
                    end = text.places[-1] + 1
                    columns = [
                        *range(first - own, first),
                        *(first + place for place in path[: end - own]),
                    ]
                    kept[tuple(text.ids[:end])] = Past(
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
