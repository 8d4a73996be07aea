"""The step judge on any GGUF file of today, through llama.cpp.

It asks the same question as the other judges of language models. Only this file uses xllamacpp,
which is llama.cpp's server in a Python module. reward_model/judges/native.py has what it shares
with the judge for LLaMA files.

The server lists the likeliest tokens with their probabilities after a bias on the logits. The same
bias of 100 on every spelling of yes and no leaves the ratio of their probabilities as it is and
puts them before all other tokens. So the score is exact however unlikely both words are.

The last bits of a result depend on which tokens are evaluated together, and with 4 bits a weight
that moves a score by up to 0.04. So a text is evaluated in groups of tokens that follow from the
text alone: what all prompts share, the prompt, each step, the question. Each group attends to the
cached groups before it. The server would also keep the first tokens of an old group, if a new one
begins alike; a spare token between both prevents that. Flash attention is off and the cache is in
float32, since both would round more.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from functools import lru_cache
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.errors import ModelError
from common.terminal import printable
from lm.gguf_file import read_model
from lm.text_encoding import CUT, EDGE
from reasoning.steps import shared_prefix
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

VERSION = "2026.10.11549"  # the one in requirements.txt
BIAS = 100.0  # nats; a larger one costs precision, and with a smaller one others may come first


class LlamaCppJudge(NativeJudge):
    """A StepJudge on a GGUF file of any architecture, tokenizer and quantization that llama.cpp
    reads.

    template, threads: as in TinyLlamaRewardScorer. context_length: in tokens; by default one less
    than the file's, at most 4096. Raises ModelError if the file cannot be loaded or xllamacpp is
    not installed.

    Scores are rounded to 6 decimals and depend only on the solution, not on earlier calls. (A model
    with recurrent layers, whose cache cannot be cut back, may be an exception.) Solutions are read
    one after another: on a CPU llama.cpp reads as many tokens a second in small groups as in large
    ones."""

    def __init__(
        self,
        model_path: str | Path,
        template: str | JudgeTemplate | None = None,
        threads: int | None = None,
        context_length: int | None = None,
    ):
        if find_spec("xllamacpp") is None:
            raise ModelError(
                f"--judge llamacpp needs xllamacpp: pip install xllamacpp=={VERSION}, or use "
                "--judge hf"
            )
        self.file = read_model(model_path)
        check_positive(threads=threads, context_length=context_length)
        # the server keeps a place for the token that it samples
        longest = max(1, self.file.context_length - 1)
        self.context_length = min(longest, context_length or MAX_CONTEXT)
        self._text = _TextEncoder(self.file)
        self._settings = {
            "path": os.path.abspath(model_path),
            "context_length": self.context_length,
            "threads": threads,
            "yes": spellings(self.file, YES),
            "no": spellings(self.file, NO),
        }
        self._start()
        try:
            self._choose_template(template)
        except BaseException:
            self.close()
            raise

    def _loaded(self, facts: dict[str, Any]) -> None:
        super()._loaded(facts)
        self._text.leading_ids = facts["leading"]

    def _load_error(self, error: str, printed: list[str]) -> str:
        """The first error that llama.cpp printed; what it raises says nothing."""
        first = next((line for line in printed if " E " in line), f" E {error}")
        reason = first.partition(" E ")[2]
        return printable(reason.partition("error loading model: ")[2] or reason)


class _TextEncoder(TextEncoder):
    """Text with `CUT` where a word is cut that reads like a control token (lm/text_encoding.py)."""

    def plain(self, text: str) -> list[Item]:
        """As in TextEncoder."""
        return [CUT.join(self.cut(text))]


# --- in the worker process ---


class _Model:
    """llama.cpp's server with one slot, whose cache holds one text."""

    def __init__(self, settings: dict):
        self.settings = settings
        self.server: Any = None
        self.threads = 0
        self.context_length = settings["context_length"]
        self.yes, self.no = settings["yes"], settings["no"]
        # the prompts that were read to the end of a group, each longer than the one before
        self.held: list[list[int]] = []
        self.cached: list[int] = []  # the tokens whose keys and values are in the cache
        self.evaluated = 0  # tokens
        threads = choose_threads(settings["threads"], settings["path"], self._trial)
        self._load(threads)
        # a text is tokenized again with every step
        self._tokenize = lru_cache(maxsize=1024)(self._tokenize_anew)
        plain = self._tokenize("a")
        whole = self._post("/tokenize", {"content": "a", "add_special": True})["tokens"]
        ends = (k for k in range(len(whole)) if whole[k : k + len(plain)] == plain)
        self.facts = {"threads": threads, "leading": whole[: next(ends, 0)]}

    def _load(self, threads: int) -> None:
        """Start the server with so many threads, if it does not have them already."""
        # native code: loaded in the worker process only
        import xllamacpp

        if self.threads == threads:
            return
        self.server = None  # frees the memory of the one before
        self.threads, self.cached = threads, []
        parameters = xllamacpp.CommonParams()
        parameters.model.path = self.settings["path"]
        parameters.n_ctx = self.context_length + 1
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.swa_full = True  # else a sliding window forgets what two texts share
        parameters.cache_ram_mib = 0  # no cache besides that of the slot
        # mmap crashes if the file becomes shorter while it is open
        parameters.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
        parameters.fit_params = parameters.warmup = False
        parameters.chat_template = "chatml"  # not used; the file's own could be one it cannot parse
        parameters.verbosity = 1  # errors
        # The server listens on a socket that is a file in a folder of this user, on no port. Only
        # the endpoint that tokenizes is used, for which the module has no function.
        self.socket = os.path.join(self.settings["folder"], "server.sock")
        Path(self.socket).unlink(missing_ok=True)
        parameters.hostnames = [self.socket]
        parameters.n_threads_http = 1
        parameters.ui = parameters.endpoint_slots = False
        self.server = xllamacpp.Server(parameters)

    def _trial(self, threads: int) -> float:
        """The seconds that so many threads need for 16 tokens; the first call is a warm-up."""
        self._load(threads)
        seconds = 0.0
        for token in (0, 1):
            start = time.perf_counter()
            self._ask([token] * min(16, self.context_length))
            seconds = time.perf_counter() - start
        return seconds

    # --- text

    def _post(self, path: str, body: dict) -> dict:
        connection = HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.connect(self.socket)
            connection.request("POST", path, json.dumps(body))
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def _tokenize_anew(self, text: str) -> list[int]:
        options = {"add_special": False, "parse_special": False}
        return self._post("/tokenize", {"content": text, **options})["tokens"] if text else []

    def _inside(self, text: str) -> list[int]:
        """The ids of a text in the middle of another one."""
        edge, ids = self._tokenize(EDGE), self._tokenize(EDGE + text)
        is_apart = ids[: len(edge)] == edge  # if not, one token holds both
        return ids[len(edge) :] if is_apart else self._tokenize(text)

    def _ids(self, items: list[Item]) -> list[int]:
        """The ids of items. Texts between two control tokens are tokenized as one text."""
        ids: list[int] = []
        text = ""
        for item in [*items, None]:
            if isinstance(item, str):
                text += item
                continue
            first, *others = text.split(CUT)
            ids += self._tokenize(first)
            for piece in others:
                ids += self._inside(piece)
            ids += [] if item is None else [item]
            text = ""
        return ids

    def count(self, text: list[Item]) -> int:
        """As in NativeModel."""
        return len(self._ids(text))

    # --- scoring

    def score(
        self,
        question: Question,
        before: list[Item],
        lines: list[list[Item]],
        skip: int,
        send: Callable[[tuple[str, Any]], None],
    ) -> tuple[str, Any]:
        """As in NativeModel."""
        start = self._ids(before)
        texts: list[list[int]] = []  # the whole text about every step
        for line in lines:
            before = [*before, *line]
            texts.append(self._ids([*before, *question.text]))
        if max(map(len, texts)) > self.context_length:
            return "too long", None
        # Each group of tokens is what one of these texts has more than the one before it. Where a
        # tokenizer merges the ends of two groups, they share less.
        head = start[: shared_prefix(start, self._ids(question.head))]
        asked = self._ids([EDGE, *question.text])
        edge = self._tokenize(EDGE)
        asked = asked[len(edge) :] if asked[: len(edge)] == edge else asked
        ends = (len(text) - max(1, shared_prefix(text[::-1], asked[::-1])) for text in texts)
        groups = [head, start, *(text[:end] for text, end in zip(texts, ends, strict=True))]
        kept = 0
        for held, group in zip(self.held, groups, strict=False):
            if held != group or self.cached[: len(held)] != held:
                break
            kept += 1
        del self.held[kept:]
        before_all, thoughts = self.evaluated, question.thoughts
        for k, group in enumerate(groups):
            if k >= kept:
                self._read(group, self.held[-1] if self.held else [])
                self.held.append(group)
            if k < skip + 2:
                continue
            text = texts[k - 2]
            score = self._answer(text, self._read(text, group))
            if thoughts and self._likeliest(text) in thoughts:
                return "thinks", None
            thoughts = ()  # the first verdict tells
            if score is None:
                return "not finite", None
            send(("score", score))
        return "done", self.evaluated - before_all

    def _read(self, text: list[int], before: list[int]) -> dict[int, float | None]:
        """Evaluate together what the text has more than `before`, which is in the cache.

        Returns what `_ask` does, or nothing if the text has nothing more."""
        start = shared_prefix(before, text)
        if start == len(text):
            return {}
        if shared_prefix(self.cached, text) > start:
            spare = next(k for k in range(3) if k not in (self.cached[start], text[start]))
            self._ask([*text[:start], spare])
        return self._ask(text)

    def _ask(self, text: list[int], bias: float = BIAS) -> dict[int, float | None]:
        """Evaluate what of a text is not in the cache.

        Returns the probabilities after the bias of as many of the likeliest next tokens as yes and
        no have spellings; None for one that is NaN."""
        count = len(self.yes) + len(self.no)
        reply = self._complete(text, bias, n_probs=count, post_sampling_probs=True)
        return {token["id"]: token["prob"] for token in reply["top_probs"]}

    def _complete(self, text: list[int], bias: float, **options: Any) -> dict[str, Any]:
        """The server's reply about the next token."""
        # Without the bias it could sample the end of the text or half a character, of which it
        # tells no probabilities.
        options["logit_bias"] = [[index, bias] for index in (*self.yes, *self.no)]
        options |= {"prompt": text, "n_predict": 1, "samplers": [], "ignore_eos": True}
        reply = self.server.handle_completions(options)
        if "choices" not in reply:
            raise RuntimeError(reply)
        self.cached, self.evaluated = text, self.evaluated + reply["timings"]["prompt_n"]
        listed = reply["choices"][0]["logprobs"]
        return listed["content"][0] if listed else {"top_probs": []}

    def _answer(self, text: list[int], top: dict[int, float | None]) -> float | None:
        """P(yes) / (P(yes) + P(no)) of the next token; None if the logits are not finite.

        top: what `_ask` returned for the text, which was read last."""
        bias = BIAS
        while None not in top.values() and bias < 1e9:
            yes, no = (sum(top.get(k) or 0.0 for k in ids) for ids in (self.yes, self.no))
            if yes + no > 0.5:
                return yes / (yes + no)
            bias *= 100  # another token is more likely by the bias and more
            top = self._ask(text, bias)
        return None

    def _likeliest(self, text: list[int]) -> int:
        """The likeliest next token of the text that was read last."""
        return self._complete(text, BIAS, n_probs=1)["top_logprobs"][0]["id"]
