"""The step judge on any Hugging Face causal LM: a directory, an adapter, a hub name or a GGUF file.

It asks the same question as the GGUF judge, on a CPU or a GPU. Many solutions are read in one
forward pass, and the texts about the steps of one solution share one row, so that what they have in
common is read once:

    row = text up to the last step's question | what only text 1 has | what only text 2 has | ...

Each of these branches attends to the prefix that it shares with the row's first text and to itself,
at the positions that follow the prefix (tree attention). So the model reads the same as if each
text were alone. The shared prefix is found by comparing token ids after each whole text was
tokenized, so it does not matter how a tokenizer treats the boundary between a step and the
question.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM

from common.errors import JudgeError, ModelError, first_line
from common.progress import taking_long
from lm.chat_template import begins_thought, chat_frame, default_template
from lm.gguf_file import GGUFFile, read_gguf
from lm.known_words import tokens_of
from lm.loading import LOAD_ERRORS, load_model, load_tokenizer, load_weights, scoring_device
from lm.prompting import is_chat
from lm.text_encoding import TextEncoder, batches_by_length
from lm.tree_attention import add_sequence, mask_dtype, tree_inputs
from reasoning.steps import shared_prefix
from reward_model.protocols import Scores, Solution, StepJudge, check_positive, nan_error, with_skip
from reward_model.templates import (
    NO,
    YES,
    JudgeTemplate,
    chat_judge_template,
    gguf_template,
    named_template,
    template_by_name,
    unusable_template,
)

TRIAL = ("2 + 3 = ?", ["Step 1: 2 + 3 = 5", "Step 2: 5 is 6", "Answer: 6"])


@dataclass
class _QuestionRow:
    """The texts (as ids) about some steps of one solution, which are read together; the longest is
    last."""

    solution: int  # index of the solution
    first: int  # texts[k] is about the score with the index first + k
    texts: list[list[int]]
    # texts[k] shares its first shared[k] ids with the last text
    shared: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        *others, trunk = self.texts
        # the last token of each text is not shared: the answer is read there
        self.shared = [min(shared_prefix(text, trunk[:-1]), len(text) - 1) for text in others]

    def __len__(self) -> int:
        return sum(map(len, self.texts)) - sum(self.shared)


class HFJudge(StepJudge):
    """A StepJudge on any causal language model that transformers can load.

    model_path: a model directory, a PEFT adapter directory, a GGUF file, or a hub name. template: a
    name in TEMPLATES or a JudgeTemplate; by default the model's chat template if it has one, else
    the one that its name says, as in the GGUF judge, or plain. batch_tokens: padded tokens
    of one forward pass (a longer solution is read alone). device: by default the GPU if there is
    one; the dtype is that of `scoring_device`. Code that comes with a model is never run. Raises
    ModelError if the model cannot be loaded.

    Scores are rounded to 6 decimals; the composition of a batch changes them by rounding errors
    only. Control tokens in a user's text are read as plain text."""

    def __init__(
        self,
        model_path: str | Path,
        template: str | JudgeTemplate | None = None,
        batch_tokens: int = 8192,
        device: str | None = None,
    ):
        self.path, self.batch_tokens = str(model_path), batch_tokens
        check_positive(batch_tokens=batch_tokens)
        if isinstance(template, str):
            named_template(template)  # a wrong name is found before the model is loaded
        device, dtype = scoring_device(device)
        self.tokenizer, self.model, file = _load(self.path, device, dtype)
        self.device = self.model.device
        config = self.model.config.get_text_config()
        # tokens; None: without limit
        self.context_length = getattr(config, "max_position_embeddings", None)
        # the mask of a row ignores a sliding window, so longer texts are read alone
        self.window = getattr(config, "sliding_window", None)
        self._encoder = TextEncoder(self.tokenizer)
        self._leading_ids = self._encoder.leading_ids
        if isinstance(template, JudgeTemplate):
            self.template_name, self.template = "given", template
        elif template is not None:
            self.template_name, self.template = template, named_template(template)
        elif file is not None:
            leading = "".join(self.tokenizer.convert_ids_to_tokens(self._leading_ids))
            self.template_name, self.template = gguf_template(file, leading)
        elif is_chat(self.tokenizer):
            self.template_name, self.template = "chat", self._chat_template()
            self._leading_ids = self._encoder.start(is_chat=True)
        else:
            name = Path(self.path).name
            self.template_name, self.template = template_by_name(self.path, name)
        self._yes, self._no = self._spellings(YES), self._spellings(NO)
        if self.template_name == "chat":
            self._check_verdict()
        self.packed = self._supports_rows()

    # --- text

    def _chat_template(self) -> JudgeTemplate:
        """The chat template of the tokenizer around the question. Raises JudgeError."""
        try:
            template = default_template(self.tokenizer.chat_template)
            return chat_judge_template(chat_frame(template, self.tokenizer.special_tokens_map))
        except ValueError as error:
            raise unusable_template(self.path, error) from None

    def _check_verdict(self) -> None:
        """Raises JudgeError if the model begins to think where its verdict is read."""
        logits = self._read_texts([_QuestionRow(0, 0, self._texts(*TRIAL, len(TRIAL[1]) - 1))])
        if begins_thought(self.tokenizer.decode(logits.argmax(-1))):
            reason = "the model begins to think where its verdict is read"
            raise unusable_template(self.path, reason)

    def _spellings(self, words: Sequence[str]) -> torch.Tensor:
        """Ids of the tokens that spell one of the words, alone or after a space (SentencePiece or
        byte-level)."""
        vocabulary = self.tokenizer.get_vocab()
        pieces = [piece for word in words for piece in (word, f"▁{word}", f"Ġ{word}")]
        ids = [vocabulary[piece] for piece in pieces if piece in vocabulary]
        if not ids:
            reason = f"its vocabulary has no token {' or '.join(words)}"
            raise ModelError(f"judge {self.path} cannot be used: {reason}")
        return torch.tensor(ids, device=self.device)

    def _texts(self, prompt: str, steps: Sequence[str], first: int) -> list[list[int]]:
        """For every step from `first` on, the ids of the text with the question about it."""
        prompt, steps = self._encoder.guard(prompt, steps)
        before = self.template.before.replace("{prompt}", prompt)
        lines = [f"{step}\n" for step in steps]
        texts = [
            before + "".join(lines[: k + 1]) + self.template.question
            for k in range(first, len(steps))
        ]
        return [self._leading_ids + ids for ids in self._encoder.ids(texts)]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """As in lm/known_words.py."""
        return tokens_of(self.tokenizer, texts)

    # --- scoring

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> Scores:
        """As in StepJudge."""
        scores: list[list[float]] = []
        unscored: set[int] = set()
        packed: list[_QuestionRow] = []
        single: list[_QuestionRow] = []
        for i, (prompt, steps, first) in enumerate(with_skip(solutions, skip)):
            readable = self.can_read(prompt, steps)
            texts = self._texts(prompt, steps, first) if readable and first < len(steps) else []
            scores.append([0.0] * len(texts))
            longest = len(texts[-1]) if texts else 0
            if not readable or (self.context_length and longest > self.context_length):
                unscored.add(i)
            elif self.packed and texts and not (self.window and longest > self.window):
                packed.append(_QuestionRow(i, 0, texts))
            else:
                single += [_QuestionRow(i, k, [text]) for k, text in enumerate(texts)]
        for rows, read in ((packed, self._read_rows), (single, self._read_texts)):
            for batch in batches_by_length(rows, self.batch_tokens):
                values = iter(self._score(read, batch))
                for row in batch:
                    found = scores[row.solution]
                    for k in range(row.first, row.first + len(row.texts)):
                        found[k] = round(next(values), 6)
                        if found[k] != found[k]:
                            prompt, steps = solutions[row.solution]
                            step = len(steps) - len(found) + k
                            raise nan_error(f"judge {self.path}", prompt, steps, step)
        return [None if i in unscored else found for i, found in enumerate(scores)]

    def _score(
        self, read: Callable[[list[_QuestionRow]], torch.Tensor], batch: list[_QuestionRow]
    ) -> list[float]:
        """The scores of all texts of a batch, row by row."""
        try:
            return self._log_odds(read(batch)).sigmoid().tolist()
        except torch.OutOfMemoryError:
            tokens = len(batch) * max(map(len, batch))
            reason = f"{tokens} tokens at once do not fit on the GPU: lower batch_tokens"
            raise JudgeError(f"judge {self.path}: {reason}") from None

    def _log_odds(self, logits: torch.Tensor) -> torch.Tensor:
        """log P(yes) - log P(no), each summed over its spellings: (N, V) -> (N,)."""
        logits = logits.float()
        return logits[:, self._yes].logsumexp(-1) - logits[:, self._no].logsumexp(-1)

    @torch.inference_mode()
    def _read_rows(self, batch: list[_QuestionRow]) -> torch.Tensor:
        """Logits (N, V) at the end of every text, row by row, the texts of a row read together."""
        ids: list[list[int]] = []
        parents: list[list[int]] = []
        ends: list[tuple[int, int]] = []  # (row, place) of the last token of every text
        for b, row in enumerate(batch):
            ids.append([])
            parents.append([])
            *others, last = row.texts
            trunk = add_sequence(ids[b], parents[b], [], last, 0)
            for text, shared in zip(others, row.shared, strict=True):
                path = add_sequence(ids[b], parents[b], trunk, text, shared)
                ends.append((b, path[-1]))
            ends.append((b, trunk[-1]))
        inputs = tree_inputs(ids, parents, 0, dtype=mask_dtype(self.model))
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state  # (B, L, H)
        rows, columns = torch.tensor(ends, device=self.device).T
        # the logits are computed only at these places
        return self.model.get_output_embeddings()(hidden[rows, columns])

    @torch.inference_mode()
    def _read_texts(self, batch: list[_QuestionRow]) -> torch.Tensor:
        """Logits (N, V) at the end of every text, for rows of one text each."""
        texts = [row.texts[0] for row in batch]
        longest = max(map(len, texts))
        # (B, L), left-padded
        ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
        mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        return self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]

    def _supports_rows(self) -> bool:
        """Whether a row gives this model the same scores as its texts alone.

        This is tried out: a model whose attention ignores such a mask, or that changes its logits
        further (a soft cap, a scale), would give wrong scores without any error."""
        texts = self._texts(*TRIAL, 0)
        try:
            in_row = self._log_odds(self._read_rows([_QuestionRow(0, 0, texts)]))
        except (TypeError, ValueError, RuntimeError, AttributeError):
            in_row = None
        singles = [_QuestionRow(0, k, [text]) for k, text in enumerate(texts)]
        alone = torch.cat([self._log_odds(self._read_texts([single])) for single in singles])
        # in half precision the last bits differ
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.3
        # NaN passes here: score_steps reports it with the step
        agrees = in_row is not None and not (in_row - alone).abs().max() > tolerance
        if not agrees:
            reason = "this architecture cannot share a prefix between questions"
            print(f"judge {self.path}: {reason}, so scoring is slower")
        return agrees

    def close(self) -> None:
        """Release the model's memory."""
        self.model = None

    def __str__(self) -> str:
        context = self.context_length or "without limit"
        return f"{self.path}: template {self.template_name}, context {context}, on {self.device}"


def _load(path: str, device: str, dtype: torch.dtype | str) -> tuple[Any, Any, GGUFFile | None]:
    """(tokenizer, model, header of a GGUF file) of a directory, an adapter, a hub name or a GGUF
    file.

    Raises ModelError."""
    file = None
    if path.endswith(".gguf"):
        file = read_gguf(path, any_kind=True)  # finds a damaged file before it is loaded
        tokenizer, model = _load_gguf(file, dtype)
    else:
        model, tokenizer = load_model(path, dtype)
    if not tokenizer.is_fast:
        raise ModelError(f"judge {path}: it has no fast tokenizer (tokenizer.json)")
    return tokenizer, model.to(device).eval(), file


def _load_gguf(file: GGUFFile, dtype: torch.dtype | str) -> tuple[Any, Any]:
    """(tokenizer, model) of a GGUF file. Raises ModelError."""
    path, metadata, name = file.path, file.metadata, "model.gguf"
    try:
        # transformers would also read other files in the folder of the GGUF file
        with TemporaryDirectory() as folder, taking_long(f"loading {path}"):
            os.symlink(os.path.abspath(path), f"{folder}/{name}")
            tokenizer = load_tokenizer(folder, gguf_file=name)
            model = load_weights(AutoModelForCausalLM, folder, dtype=dtype, gguf_file=name)
    except (*LOAD_ERRORS, IndexError, AttributeError, NotImplementedError) as error:
        raise ModelError(f"judge {path} cannot be loaded: {first_line(error)}") from None
    is_llama = metadata.get("tokenizer.ggml.model") == "llama"
    if is_llama and metadata.get("tokenizer.ggml.add_space_prefix", True):
        # text after a control token begins with a space, as in LLaMA's own tokenizer and llama.cpp
        space = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(space)
        tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer, model
