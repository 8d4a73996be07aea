"""The GGUF step judge: a language model asked after every step whether it is right.

Score of a step = P(yes) / (P(yes) + P(no)) from the logits where the answer would stand, over all spellings of the two words; no
text is generated. This is the only file that knows ctransformers. That library ends its process on inputs it does not
expect, so the file is checked before (gguf_file.py), lengths too, and the native code runs in a process of its own.
"""

import ctypes
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from common.errors import JudgeError, short
from lm.gguf_file import GGUFFile, TokenType, read_gguf
from reward_model.protocols import Solution, StepJudge, describe_step
from reward_model.templates import NO, TEMPLATES, YES, JudgeTemplate, fitting_template

MAX_CONTEXT = 4096  # tokens; more only if asked for, since the cache grows with it
BATCH = 512  # tokens evaluated at once; the library crashes above
SMALL = 50_000_000  # bytes of a file below which one thread is enough
# Text is tokenized behind this character. It is in no vocabulary and merges with nothing, so what follows is tokenized as the
# middle of a text (the library would put a space in front of its beginning).
EDGE = "\U0010ffff"

Item = int | str  # a token id, or text to be tokenized


class TinyLlamaRewardScorer(StepJudge):
    """A StepJudge on a GGUF file of the LLaMA architecture.

    template: a name in TEMPLATES or a JudgeTemplate; by default what the file says of itself. threads: at most the cores this
    process may use; by default as many as pay off. context_length: tokens; by default the file's, at most 4096.
    Raises JudgeError if the file cannot be used. Scores are rounded to 6 decimals and depend on nothing but the
    solution: not on what was scored before, nor on threads. Use it as a context manager, or `close` it."""

    def __init__(
        self,
        model_path: str | Path,
        template: str | JudgeTemplate | None = None,
        threads: int | None = None,
        context_length: int | None = None,
    ):
        self.file = read_gguf(model_path)
        for name, value in (("threads", threads), ("context_length", context_length)):
            if value is not None and value < 1:
                raise JudgeError(f"{name} must be at least 1, got {value}")
        if isinstance(template, str) and template not in TEMPLATES:
            raise JudgeError(
                f"unknown judge template {template!r}: expected one of {', '.join(TEMPLATES)}"
            )
        self.template_name = (
            choose_template(self.file)
            if template is None
            else template
            if isinstance(template, str)
            else "given"
        )
        self.template = (
            template if isinstance(template, JudgeTemplate) else TEMPLATES[self.template_name]
        )
        self.context_length = min(self.file.context_length, context_length or MAX_CONTEXT)
        self.tokens_evaluated = 0
        self._text = _Text(self.file)
        self._settings = {
            "path": os.path.abspath(model_path),
            "context_length": self.context_length,
            "threads": threads,
            "yes": self._text.spellings(YES),
            "no": self._text.spellings(NO),
        }
        self._process: subprocess.Popen | None = None
        self._start()

    # --- scoring

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> list[list[float] | None]:
        """As in StepJudge. A solution that outgrows the context is found before anything is evaluated; a judge that failed can be
        used again: it starts afresh."""
        skip = skip or [0] * len(solutions)
        return [
            self._score(prompt, steps, first)
            for (prompt, steps), first in zip(solutions, skip, strict=True)
        ]

    def _score(self, prompt: str, steps: Sequence[str], skip: int) -> list[float] | None:
        if skip >= len(steps):
            return []
        try:
            before = self._text.control(self.template.before, prompt, begins=True)
            lines = [self._text.plain(step + "\n") for step in steps]
            question = self._text.control(self.template.question, begins=False)
        except UnicodeEncodeError:
            raise JudgeError(
                f"prompt {short(prompt)}: half of a Unicode surrogate pair cannot be scored"
            ) from None
        scores: list[float] = []
        try:
            self._start()
            self._connection.send(([before, *lines], question, skip))
            while (reply := self._connection.recv())[0] == "score":
                scores.append(round(reply[1], 6))
        except (EOFError, OSError):
            place = describe_step(prompt, steps, skip + len(scores))
            raise JudgeError(f"{self._obituary()} while it scored {place}") from None
        except BaseException:
            self.close()  # replies to an interrupted question would be taken for those of the next one
            raise
        kind, value = reply
        if kind == "too long":
            return None
        if kind == "not finite":
            place = describe_step(prompt, steps, skip + len(scores))
            raise JudgeError(
                f"judge {self.file.path}: the model's logits are not finite at {place}"
            )
        self.tokens_evaluated += value
        return scores

    # --- the worker process

    def _start(self) -> None:
        """Start the worker unless it runs. It imports ctransformers and nothing else heavy, and ends when its pipe does."""
        if self._process is not None:
            return
        self._connection, theirs = Pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - what the library prints, for the message if it fails
        root = str(Path(__file__).resolve().parents[1])
        code = f"import sys; sys.path.insert(0, {root!r}); import {__name__} as judge; judge._serve({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output,
        )  # fmt: skip
        theirs.close()
        try:
            self._connection.send(self._settings)
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            raise JudgeError(f"{self._obituary()} while it loaded the file") from None
        if kind == "failed":
            self.close()
            raise JudgeError(
                f"judge {self.file.path} cannot be loaded: {value} (a tensor of the wrong shape?)"
            )
        self.threads = value

    def _obituary(self) -> str:
        """How the worker ended, in words; cleans up after it."""
        status = self._process.wait()
        how = (
            signal.Signals(-status).name
            if status < 0
            else f"exit code {status}: {self._last_words()}"
        )
        self.close()
        return f"judge {self.file.path}: its process died ({how})"

    def _last_words(self) -> str:
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        """End the worker. Scoring again starts another."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
            self._output.close()
            self._process = None

    def __str__(self) -> str:
        return f"{self.file.path}: template {self.template_name}, context {self.context_length}, threads {self.threads}"


def choose_template(file: GGUFFile) -> str:
    """The name in TEMPLATES that fits what the file says of itself."""
    return fitting_template(
        f"{file.metadata.get('tokenizer.chat_template', '')}\n{file.metadata.get('general.name', '')}"
    )


class _Text:
    """What is text and what is a token of its own. Control tokens are ids in a template, and never in a user's text."""

    def __init__(self, file: GGUFFile):
        self.path = file.path
        kinds = list(zip(file.tokens, file.token_types, strict=True))
        self.ids = {token: index for index, token in enumerate(file.tokens)}
        control = [
            token
            for token, kind in kinds
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED) and len(token) > 1
        ]
        special = [token for token, kind in kinds if kind != TokenType.NORMAL and len(token) > 1]
        self._control = re.compile(
            "|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)"
        )
        self._special = re.compile(f"(?={'|'.join(map(re.escape, special))})")
        self._space = " " if file.metadata.get("tokenizer.ggml.add_space_prefix", True) else ""
        bos = file.metadata.get("tokenizer.ggml.bos_token_id", 1)
        self._bos = [bos] if file.metadata.get("tokenizer.ggml.add_bos_token", True) else []

    def spellings(self, words: Sequence[str]) -> list[int]:
        """Ids of the tokens that are one of the words, alone or after a space."""
        ids = [
            self.ids[token] for word in words for token in (word, f"▁{word}") if token in self.ids
        ]
        if not ids:
            raise JudgeError(
                f"judge {self.path} cannot be used: its vocabulary has no token {' or '.join(words)}"
            )
        return ids

    def plain(self, text: str) -> list[Item]:
        """A user's text. Text that reads like a special token is cut in two, so that its pieces cannot merge into it; a NUL, which
        would end the text for the library, becomes its byte token."""
        text.encode()
        items: list[Item] = []
        for part in text.split("\0"):
            cuts = [0, *(match.start() + 1 for match in self._special.finditer(part)), len(part)]
            items += [part[start:end] for start, end in pairwise(cuts) if start < end]
            items.append(self.ids["<0x00>"])
        return items[:-1]

    def control(self, template: str, prompt: str = "", begins: bool = False) -> list[Item]:
        """A template's text with the prompt put in. As in Hugging Face's LLaMA tokenizer a text begins with a space, and so does
        what follows a control token."""
        items: list[Item] = list(self._bos) if begins else []
        end = 0
        for match in [*self._control.finditer(template), None]:
            text = template[end : match.start() if match else None]
            if text:
                items += self.plain(
                    (self._space if begins or end else "") + text.replace("{prompt}", prompt)
                )
            if match:
                items.append(self.ids[match[0]])
                end = match.end()
        return items


# --- in the worker process -------------------------------------------------------------------------------------------------------


def _serve(descriptor: int) -> None:
    """Score what comes through the pipe until it closes."""
    # Ctrl-C goes to the whole group; the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    settings = connection.recv()
    try:
        model = _Model(settings)
    except (RuntimeError, ValueError, OSError) as error:
        connection.send(("failed", str(error)))
        return
    connection.send(("ready", model.threads))
    try:
        while True:
            model.score(*connection.recv(), connection)
    except (EOFError, OSError):  # the parent is gone
        return


class _Model:
    def __init__(self, settings: dict):
        from ctransformers.llm import LLM, Config

        cpu = Path("/proc/cpuinfo")
        # left to itself ctransformers takes a second to find out
        has_avx2 = cpu.exists() and " avx2 " in cpu.read_text()
        # mmap crashes on a file that shrinks
        config = Config(context_length=settings["context_length"], mmap=False)
        self.llm = LLM(settings["path"], "gguf", config=config, lib="avx2" if has_avx2 else None)
        self.path, self.context_length = settings["path"], settings["context_length"]
        self.yes, self.no = settings["yes"], settings["no"]
        self.edge = len(self._tokenize(EDGE))
        # the groups of tokens whose keys and values are in the cache
        self.held: list[list[int]] = []
        self.threads = self._choose_threads(settings["threads"])

    def _choose_threads(self, threads: int | None) -> int:
        """Threads that find no free core wait for each other by spinning, which can be a hundred times slower than one thread, and
        a small model gains little: unless told, take all cores only if the model is large and that is clearly faster now."""
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        if threads or cores == 1 or os.path.getsize(self.path) < SMALL:
            return min(threads or 1, cores)
        seconds = {}
        for self.threads in (1, 1, cores):  # the first call warms up
            start = time.perf_counter()
            self._evaluate([0] * min(16, self.context_length), 0)
            seconds[self.threads] = time.perf_counter() - start
        return cores if seconds[cores] * 1.3 < seconds[1] else 1

    def _tokenize(self, text: str) -> list[int]:
        data = text.encode()
        # LLM.tokenize reserves a token a character, and an emoji has four
        buffer = (ctypes.c_int * (3 * len(data) + 8))()
        return buffer[: self.llm.ctransformers_llm_tokenize(data, False, buffer)]

    def _ids(self, items: list[Item]) -> list[int]:
        ids: list[int] = []
        for item in items:
            ids += [item] if isinstance(item, int) else self._tokenize(EDGE + item)[self.edge :]
        return ids

    def _evaluate(self, ids: list[int], past: int) -> None:
        if not self.llm.ctransformers_llm_batch_eval(
            (ctypes.c_int * len(ids))(*ids), len(ids), past, BATCH, self.threads
        ):
            raise RuntimeError("the library could not evaluate")

    def score(
        self, groups: list[list[Item]], question: list[Item], unscored: int, connection: Connection
    ) -> None:
        """groups: the beginning, then one for each step, the first `unscored` of them mere context.

        The last bits of a result depend on which tokens are evaluated together. Each group is evaluated on its own and the
        cache is kept by whole groups only, so a result is the same whatever was in the cache."""
        groups, question = [self._ids(group) for group in groups], self._ids(question)
        total = sum(map(len, groups)) + len(question)
        if total > self.context_length:
            connection.send(("too long", total))
            return
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
            if k > unscored:
                self._evaluate(question, past)
                del self.held[k + 1 :]  # the question was written over what followed
                evaluated += len(question)
                score = self._answer()
                if not math.isfinite(score):
                    connection.send(("not finite", None))
                    return
                connection.send(("score", score))
        connection.send(("done", evaluated))

    def _answer(self) -> float:
        """P(yes) / (P(yes) + P(no)) for the token that comes next."""
        logits = self.llm.ctransformers_llm_logits_data()
        top = max(logits[index] for index in self.yes + self.no)
        yes, no = (
            sum(math.exp(logits[index] - top) for index in ids) for ids in (self.yes, self.no)
        )
        return yes / (yes + no)
