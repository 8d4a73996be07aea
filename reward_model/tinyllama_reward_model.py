"""The GGUF step judge: it asks a language model after every step whether the step is right.

The score of a step is P(yes) / (P(yes) + P(no)) from the logits at the place of the answer, summed
over all spellings of the two words; no text is generated. Only this file uses ctransformers, a
library of 2023: it reads LLaMA files alone, and `--judge llamacpp` reads the others
(reward_model/judges/llamacpp.py). reward_model/judges/native.py has what both share.
"""

import ctypes
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import ModelError
from lm.gguf_file import GGUFFile, OtherKindError, read_gguf
from reward_model.judges.native import (
    MAX_CONTEXT,
    Item,
    NativeJudge,
    Question,
    TextEncoder,
    choose_threads,
    spellings,
)
from reward_model.protocols import check_positive
from reward_model.templates import NO, YES, JudgeTemplate

BATCH = 512  # tokens evaluated at once; the library crashes with more
# Text is tokenized after this character, which is in no vocabulary and merges with nothing. So the
# text is tokenized as the middle of a text; the library would put a space before the start of a
# text.
EDGE = "\U0010ffff"


class TinyLlamaRewardScorer(NativeJudge):
    """A StepJudge on a GGUF file of the LLaMA architecture.

    template: a name in TEMPLATES or a JudgeTemplate; by default the file's own chat template, or
    without one what the name of the model says. threads: at most the cores that this process may
    use; by default chosen by a short trial. context_length: in tokens; by default the file's, at
    most 4096. Raises ModelError if the file cannot be loaded.

    Scores are rounded to 6 decimals and depend only on the solution, not on earlier calls or on
    threads. Use the judge as a context manager, or `close` it."""

    def __init__(
        self,
        model_path: str | Path,
        template: str | JudgeTemplate | None = None,
        threads: int | None = None,
        context_length: int | None = None,
    ):
        try:
            self.file = read_gguf(model_path)
        except OtherKindError as error:
            raise ModelError(f"{error}; --judge llamacpp reads such files") from None
        check_positive(threads=threads, context_length=context_length)
        self._text = _TextEncoder(self.file)
        self._choose_template(template)
        self.context_length = min(self.file.context_length, context_length or MAX_CONTEXT)
        self._settings = {
            "path": os.path.abspath(model_path),
            "context_length": self.context_length,
            "threads": threads,
            "yes": spellings(self.file, YES),
            "no": spellings(self.file, NO),
        }
        self._start()

    def _load_error(self, error: str, printed: list[str]) -> str:
        return f"{error} (a tensor of the wrong shape?)"


class _TextEncoder(TextEncoder):
    """As in Hugging Face's LLaMA tokenizer there is a space at the start of a text and after a
    control token."""

    def __init__(self, file: GGUFFile):
        super().__init__(file)
        self.space = " " if file.metadata.get("tokenizer.ggml.add_space_prefix", True) else ""
        bos = file.metadata.get("tokenizer.ggml.bos_token_id", 1)
        self.leading_ids = [bos] if file.metadata.get("tokenizer.ggml.add_bos_token", True) else []

    def plain(self, text: str) -> list[Item]:
        """As in TextEncoder. A NUL, at which the library would end the text, becomes its byte
        token."""
        items: list[Item] = []
        for part in text.split("\0"):
            items += [*self.cut(part), self.ids["<0x00>"]]
        return items[:-1]


# --- in the worker process ---


class _Model:
    """The library's model with its cache of keys and values."""

    def __init__(self, settings: dict):
        # native code: loaded in the worker process only
        from ctransformers.llm import LLM, Config

        cpu = Path("/proc/cpuinfo")
        # without this argument ctransformers needs a second to find out
        has_avx2 = cpu.exists() and " avx2 " in cpu.read_text()
        # mmap crashes if the file becomes shorter while it is open
        config = Config(context_length=settings["context_length"], mmap=False)
        self.llm = LLM(settings["path"], "gguf", config=config, lib="avx2" if has_avx2 else None)
        self.context_length = settings["context_length"]
        self.yes, self.no = settings["yes"], settings["no"]
        self.edge = len(self._tokenize(EDGE))
        # the groups of tokens whose keys and values are in the cache
        self.held: list[list[int]] = []
        self.threads = choose_threads(settings["threads"], settings["path"], self._trial)
        self.facts = {"threads": self.threads}

    def _trial(self, threads: int) -> float:
        """The seconds that so many threads need for 16 tokens; the first call is a warm-up."""
        seconds = 0.0
        for self.threads in (1, threads):
            start = time.perf_counter()
            self._evaluate([0] * min(16, self.context_length), 0)
            seconds = time.perf_counter() - start
        return seconds

    def _tokenize(self, text: str) -> list[int]:
        data = text.encode()
        # LLM.tokenize reserves one token for a character, but an emoji has four
        buffer = (ctypes.c_int * (3 * len(data) + 8))()
        return buffer[: self.llm.ctransformers_llm_tokenize(data, False, buffer)]

    def _ids(self, items: list[Item]) -> list[int]:
        ids: list[int] = []
        for item in items:
            ids += [item] if isinstance(item, int) else self._tokenize(EDGE + item)[self.edge :]
        return ids

    def _evaluate(self, ids: list[int], past: int) -> None:
        """Evaluate tokens after the first `past` tokens of the cache."""
        tokens = (ctypes.c_int * len(ids))(*ids)
        if not self.llm.ctransformers_llm_batch_eval(tokens, len(ids), past, BATCH, self.threads):
            raise RuntimeError("the library could not evaluate")

    def count(self, text: list[Item]) -> int:
        """As in NativeModel."""
        return len(self._ids(text))

    def score(
        self,
        question: Question,
        before: list[Item],
        lines: list[list[Item]],
        skip: int,
        send: Callable[[tuple[str, Any]], None],
    ) -> tuple[str, Any]:
        """As in NativeModel.

        The last bits of a result depend on which tokens are evaluated together. So each text is a
        group that is evaluated on its own, and the cache is kept in whole groups: the result does
        not depend on what was in the cache."""
        groups = [self._ids(text) for text in (before, *lines)]
        question_ids, thoughts = self._ids(question.text), question.thoughts
        if sum(map(len, groups)) + len(question_ids) > self.context_length:
            return "too long", None
        kept = 0
        while kept < min(len(self.held), len(groups)) and self.held[kept] == groups[kept]:
            kept += 1
        del self.held[kept:]
        past = evaluated = 0
        for k, group in enumerate(groups):
            if k == len(self.held):
                self._evaluate(group, past)
                self.held.append(group)
                evaluated += len(group)
            past += len(group)
            if k > skip:
                self._evaluate(question_ids, past)
                del self.held[k + 1 :]  # the question overwrote the groups after this one
                evaluated += len(question_ids)
                if thoughts and self._likeliest() in thoughts:
                    return "thinks", None
                thoughts = ()  # the first verdict tells
                score = self._answer()
                if not math.isfinite(score):
                    return "not finite", None
                send(("score", score))
        return "done", evaluated

    def _likeliest(self) -> int:
        """The likeliest next token."""
        logits = self.llm.ctransformers_llm_logits_data()
        return max(range(self.llm.ctransformers_llm_vocab_size()), key=logits.__getitem__)

    def _answer(self) -> float:
        """P(yes) / (P(yes) + P(no)) of the next token."""
        logits = self.llm.ctransformers_llm_logits_data()
        top = max(logits[index] for index in self.yes + self.no)
        yes, no = (
            sum(math.exp(logits[index] - top) for index in ids) for ids in (self.yes, self.no)
        )
        return yes / (yes + no)
