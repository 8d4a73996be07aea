"""The same question to any Hugging Face causal language model: a directory, an adapter, a hub name, a GGUF file; on CPU or GPU.

Many solutions are read in one forward pass, and what the questions after the steps of one solution share is read once:

    row = text up to the last step's question | what the text of step 1 has of its own | ... of step 2 | ...

Every such branch is attended to the beginning it shares with the row's first text and to itself, at the positions that follow that
beginning, so the model reads what it would read if the text stood alone. The beginnings are compared as token ids after
each whole text was tokenized, so it does not matter how a tokenizer treats the boundary between a step and the question.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import JudgeError, ModelError, first_line
from lm.gguf_file import read_gguf
from lm.loading import LOAD_ERRORS, load_model, load_weights, scoring_device
from lm.text_encoding import PlainText, batches_by_length
from lm.tree_attention import add_sequence, mask_dtype, tree_inputs
from reward_model.protocols import Solution, StepJudge, describe_step
from reward_model.templates import CHAT, NO, TEMPLATES, YES, JudgeTemplate, fitting_template

STEPS_HERE = "<<steps>>"
# a solution to try a model with
TRIAL = ("2 + 3 = ?", ["Step 1: 2 + 3 = 5", "Step 2: 5 is 6", "Answer: 6"])


@dataclass
class _PackedRow:
    """What is read together: the texts (as ids) of some steps of one solution, the longest last."""

    solution: int
    first: int  # which of the solution's scores is that of texts[0]
    texts: list[list[int]]
    # how many first ids texts[k] has in common with the last text
    shared: list[int] = field(default_factory=list)

    def __post_init__(self):
        trunk = self.texts[-1]
        for text in self.texts[:-1]:
            # each text keeps its last token, where the answer is read, to itself
            most = min(len(text), len(trunk)) - 1
            self.shared.append(next((i for i in range(most) if text[i] != trunk[i]), most))

    def __len__(self) -> int:
        return len(self.texts[-1]) + sum(
            len(text) - n for text, n in zip(self.texts, self.shared, strict=False)
        )


class HFJudge(StepJudge):
    """A StepJudge on any causal language model that transformers can load.

    model_path: a model directory, a PEFT adapter directory, a GGUF file, or a hub name. template: a name in TEMPLATES or a
    JudgeTemplate; by default a directory's own chat template if it has one, else what the model says of itself, as `gguf` does.
    batch_tokens: padded tokens of one forward pass (a longer solution is read alone). device: by default the GPU if there is one;
    the weights are in float32 on a CPU and as stored on a GPU. Code that comes with a model is never run.
    Raises JudgeError if the model cannot be used. Scores are rounded to 6 decimals; what is batched together moves them by
    rounding errors only. A user's text that reads like a control token stays text."""

    def __init__(
        self,
        model_path: str | Path,
        template: str | JudgeTemplate | None = None,
        batch_tokens: int = 8192,
        device: str | None = None,
    ):
        self.path, self.batch_tokens = str(model_path), batch_tokens
        if batch_tokens < 1:
            raise JudgeError(f"batch_tokens must be at least 1, got {batch_tokens}")
        if isinstance(template, str) and template not in TEMPLATES:
            raise JudgeError(
                f"unknown judge template {template!r}: expected one of {', '.join(TEMPLATES)}"
            )
        device, dtype = scoring_device(device)
        self.tokenizer, self.model, name = _load(self.path, device, dtype)
        self.device = self.model.device
        config = self.model.config.get_text_config()
        # tokens; None: without limit
        self.context_length = getattr(config, "max_position_embeddings", None)
        self.window = getattr(config, "sliding_window", None)  # a row's mask knows nothing of it
        own = template is None and not self.path.endswith(".gguf") and self.tokenizer.chat_template
        if isinstance(template, JudgeTemplate):
            self.template, self.template_name = template, "given"
        elif own:
            self.template, self.template_name = self._chat_template(), "chat"
        else:
            self.template_name = template or fitting_template(
                f"{self.tokenizer.chat_template or ''}\n{name}"
            )
            self.template = TEMPLATES[self.template_name]
        self._plain = PlainText(self.tokenizer)
        # a chat template writes what begins a text itself
        self._begins = [] if own else self._plain.begins
        self._yes, self._no = self._spellings(YES), self._spellings(NO)
        self.packed = self._reads_rows()

    # --- text

    def _chat_template(self) -> JudgeTemplate:
        """The model's own chat template around the question; a model that can think first is told not to."""
        message = {"role": "user", "content": CHAT.before + STEPS_HERE + CHAT.question}
        try:
            text = self.tokenizer.apply_chat_template(
                [message], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            before, question = text.split(STEPS_HERE)
        except Exception as error:  # templates are programs of their own
            raise JudgeError(
                f"judge {self.path}: its chat template fails ({first_line(error)}): name a judge template"
            ) from None
        return JudgeTemplate(before, question)

    def _spellings(self, words: Sequence[str]) -> torch.Tensor:
        """Ids of the tokens that are one of the words, alone or after a space (SentencePiece or byte-level)."""
        vocabulary = self.tokenizer.get_vocab()
        ids = [
            vocabulary[piece]
            for word in words
            for piece in (word, f"▁{word}", f"Ġ{word}")
            if piece in vocabulary
        ]
        if not ids:
            raise JudgeError(
                f"judge {self.path} cannot be used: its vocabulary has no token {' or '.join(words)}"
            )
        return torch.tensor(ids, device=self.device)

    def _texts(self, prompt: str, steps: Sequence[str], first: int) -> list[list[int]]:
        """For every step from `first` on, the ids of the text that ends with the question about it."""
        prompt, steps = self._plain.guard(prompt, steps)
        before = self.template.before.replace("{prompt}", prompt)
        lines = [f"{step}\n" for step in steps]
        texts = [
            before + "".join(lines[: k + 1]) + self.template.question
            for k in range(first, len(steps))
        ]
        return [self._begins + ids for ids in self._plain.ids(texts)]

    # --- scoring

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> list[list[float] | None]:
        """As in StepJudge."""
        results: list[list[float] | None] = []
        packed, alone = [], []
        for i, ((prompt, steps), first) in enumerate(
            zip(solutions, skip or [0] * len(solutions), strict=True)
        ):
            texts = self._texts(prompt, steps, first) if first < len(steps) else []
            if texts and self.context_length and len(texts[-1]) > self.context_length:
                results.append(None)
                continue
            results.append([0.0] * len(texts))
            if self.packed and texts and not (self.window and len(texts[-1]) > self.window):
                packed.append(_PackedRow(i, 0, texts))
            else:
                alone += [_PackedRow(i, k, [text]) for k, text in enumerate(texts)]
        for rows, read in ((packed, self._read_rows), (alone, self._read_texts)):
            for batch in batches_by_length(rows, self.batch_tokens):
                scores = iter(self._score(read, batch))
                for row in batch:
                    for k, score in zip(
                        range(row.first, row.first + len(row.texts)), scores, strict=False
                    ):
                        if score != score:
                            prompt, steps = solutions[row.solution]
                            place = describe_step(
                                prompt, steps, len(steps) - len(results[row.solution]) + k
                            )
                            raise JudgeError(
                                f"judge {self.path}: the model's logits are not finite at {place}"
                            )
                        results[row.solution][k] = round(score, 6)
        return results

    def _score(
        self, read: Callable[[list[_PackedRow]], torch.Tensor], batch: list[_PackedRow]
    ) -> list[float]:
        try:
            return self._log_odds(read(batch)).sigmoid().tolist()
        except torch.OutOfMemoryError:
            tokens = len(batch) * max(map(len, batch))
            raise JudgeError(
                f"judge {self.path}: {tokens} tokens at once do not fit on the GPU: lower batch_tokens"
            ) from None

    def _log_odds(self, logits: torch.Tensor) -> torch.Tensor:
        """log P(yes) - log P(no), each summed over its spellings: (N, V) -> (N,)."""
        logits = logits.float()
        return logits[:, self._yes].logsumexp(-1) - logits[:, self._no].logsumexp(-1)

    @torch.inference_mode()
    def _read_rows(self, batch: list[_PackedRow]) -> torch.Tensor:
        """Logits (N, V) at the end of every text, row by row, each row read in one piece."""
        ids: list[list[int]] = []
        parents: list[list[int]] = []
        asked: list[tuple[int, int]] = []  # (row, place) of the last token of every text
        for b, row in enumerate(batch):
            ids.append([])
            parents.append([])
            trunk = add_sequence(ids[b], parents[b], [], row.texts[-1], 0)
            for text, shared in zip(row.texts, row.shared, strict=False):
                path = add_sequence(ids[b], parents[b], trunk, text, shared)
                asked.append((b, path[-1]))
            asked.append((b, trunk[-1]))
        inputs = tree_inputs(ids, parents, 0, dtype=mask_dtype(self.model))
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state  # (B, L, H)
        rows, columns = torch.tensor(asked, device=self.device).T
        # the vocabulary only where it is asked
        return self.model.get_output_embeddings()(hidden[rows, columns])

    @torch.inference_mode()
    def _read_texts(self, batch: list[_PackedRow]) -> torch.Tensor:
        """Logits (N, V) at the end of every text, each text read on its own: for rows of one text."""
        texts = [row.texts[0] for row in batch]
        longest = max(map(len, texts))
        # (B, L), left-padded
        ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
        mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        return self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]

    def _reads_rows(self) -> bool:
        """Whether this model reads a row as it reads the texts alone. Tried, since a model whose attention takes no mask of this
        kind, or that does more to its logits, would be silently wrong."""
        texts = self._texts(*TRIAL, 0)
        try:
            rows = self._log_odds(self._read_rows([_PackedRow(0, 0, texts)]))
        except (TypeError, ValueError, RuntimeError, AttributeError):
            rows = None
        texts_alone = [
            self._log_odds(self._read_texts([_PackedRow(0, k, [text])]))
            for k, text in enumerate(texts)
        ]
        alone = torch.cat(texts_alone)
        # half precision: a few of its last bits
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.3
        # NaN is found where it is scored
        agrees = rows is not None and not (rows - alone).abs().max() > tolerance
        if not agrees:
            print(
                f"judge {self.path}: this architecture cannot share a solution's beginning between questions; slower without"
            )
        return agrees

    def close(self) -> None:
        """Give the model's memory back."""
        self.model = None

    def __str__(self) -> str:
        context = self.context_length or "without limit"
        return f"{self.path}: template {self.template_name}, context {context}, on {self.device}"


def _load(path: str, device: str, dtype: torch.dtype | str) -> tuple[Any, Any, str]:
    """(tokenizer, model, name) of a directory, an adapter, a hub name or a GGUF file.

    Raises ModelError."""
    if path.endswith(".gguf"):
        tokenizer, model, name = _load_gguf(path, dtype)
    else:
        model, tokenizer = load_model(path, dtype)
        name = Path(path).name
    if not tokenizer.is_fast:
        raise ModelError(f"judge {path}: it has no fast tokenizer (tokenizer.json)")
    return tokenizer, model.to(device).eval(), name


def _load_gguf(path: str, dtype: torch.dtype | str) -> tuple[Any, Any, str]:
    metadata = read_gguf(path, any_kind=True).metadata  # finds a damaged file before it is loaded
    try:
        with TemporaryDirectory() as folder:  # beside other files transformers would mix them in
            os.symlink(os.path.abspath(path), f"{folder}/model.gguf")
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
            options = {"dtype": dtype, "gguf_file": "model.gguf"}
            model = load_weights(AutoModelForCausalLM, folder, **options)
    except (*LOAD_ERRORS, IndexError, AttributeError, NotImplementedError) as error:
        raise ModelError(f"judge {path} cannot be loaded: {first_line(error)}") from None
    is_llama = metadata.get("tokenizer.ggml.model") == "llama"
    if is_llama and metadata.get("tokenizer.ggml.add_space_prefix", True):
        # as in LLaMA's own tokenizer and in llama.cpp, text after a control token begins with a space
        space = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(space)
        tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer, model, str(metadata.get("general.name", ""))
