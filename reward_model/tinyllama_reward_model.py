"""The GGUF step judge: it asks a language model after every step whether the step is right.

The score of a step is P(yes) / (P(yes) + P(no)) from the logits at the place of the answer, summed
over all spellings of the two words; no text is generated. Only this file uses ctransformers. That
library ends its process on input that it does not expect. So the file (lm/gguf_file.py) and the
lengths are checked first, and the native code runs in a process of its own.
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

from common.errors import JudgeError, ModelError
from common.progress import taking_long
from lm.chat_template import begins_thought
from lm.gguf_file import GGUFFile, TokenType, read_gguf
from reward_model.protocols import (
    Scores,
    Solution,
    StepJudge,
    check_positive,
    describe_step,
    nan_error,
    with_skip,
)
from reward_model.templates import (
    NO,
    YES,
    JudgeTemplate,
    gguf_template,
    named_template,
    unusable_template,
)

MAX_CONTEXT = 4096  # default limit in tokens, since the cache grows with the context
BATCH = 512  # tokens evaluated at once; the library crashes with more
SMALL = 50_000_000  # bytes; with a smaller file one thread is enough
# Text is tokenized after this character, which is in no vocabulary and merges with nothing. So the
# text is tokenized as the middle of a text; the library would put a space before the start of a
# text.
EDGE = "\U0010ffff"

Item = int | str  # a token id, or text to be tokenized


class TinyLlamaRewardScorer(StepJudge):
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
        self.file = read_gguf(model_path)
        check_positive(threads=threads, context_length=context_length)
        self._text = _TextEncoder(self.file)
        if isinstance(template, JudgeTemplate):
            self.template_name, self.template = "given", template
        elif template is not None:
            self.template_name, self.template = template, named_template(template)
        else:
            self.template_name, self.template = gguf_template(self.file, self._text.leading)
        self.context_length = min(self.file.context_length, context_length or MAX_CONTEXT)
        self.tokens_evaluated = 0
        is_chat = self.template_name == "chat"
        tokens = enumerate(self.file.tokens if is_chat else [])
        self._settings = {
            "path": os.path.abspath(model_path),
            "context_length": self.context_length,
            "threads": threads,
            "yes": self._text.spellings(YES),
            "no": self._text.spellings(NO),
            # where the verdict is read, a model that begins to think has none yet
            "thoughts": [k for k, token in tokens if begins_thought(token.replace("▁", " "))],
        }
        self._process: subprocess.Popen | None = None
        self._start()

    # --- scoring

    def score_steps(
        self, solutions: Sequence[Solution], skip: Sequence[int] | None = None
    ) -> Scores:
        """As in StepJudge. The length of a solution is checked before anything of it is evaluated.

        A judge that failed can be used again: it starts a new process."""
        requests = with_skip(solutions, skip)
        return [self._score(prompt, steps, first) for prompt, steps, first in requests]

    def _score(self, prompt: str, steps: Sequence[str], skip: int) -> list[float] | None:
        if not self.can_read(prompt, steps):
            return None
        if skip >= len(steps):
            return []
        before = self._text.control(self.template.before, prompt, is_start=True)
        lines = [self._text.plain(step + "\n") for step in steps]
        question = self._text.control(self.template.question)
        scores: list[float] = []
        try:
            self._start()
            self._connection.send(([before, *lines], question, skip))
            while (reply := self._connection.recv())[0] == "score":
                scores.append(round(reply[1], 6))
        except (EOFError, OSError):
            place = describe_step(prompt, steps, skip + len(scores))
            raise JudgeError(f"{self._exit_reason()} while it scored {place}") from None
        except BaseException:
            self.close()  # else the next call would read the replies to this one
            raise
        kind, value = reply
        if kind == "too long":
            return None
        if kind == "thinks":
            reason = "the model begins to think where its verdict is read"
            raise unusable_template(self.file.path, reason)
        if kind == "not finite":
            raise nan_error(f"judge {self.file.path}", prompt, steps, skip + len(scores))
        self.tokens_evaluated += value
        return scores

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """As in lm/known_words.py."""
        try:
            self._start()
            self._connection.send([self._text.plain(text) for text in texts])
            return self._connection.recv()
        except (EOFError, OSError):
            raise JudgeError(f"{self._exit_reason()} while it counted tokens") from None
        except BaseException:
            self.close()  # else the next call would read the reply to this one
            raise

    # --- the worker process

    def _start(self) -> None:
        """Start the worker process if there is none.

        It imports ctransformers and nothing else that is heavy, and ends when its pipe is
        closed."""
        if self._process is not None:
            return
        self._connection, theirs = Pipe()
        # what the library prints, for the error message if it fails
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process runs)
        root = str(Path(__file__).resolve().parents[1])
        path = f"import sys; sys.path.insert(0, {root!r})"
        code = f"{path}; import {__name__} as judge; judge._serve({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
        )
        theirs.close()
        try:
            self._connection.send(self._settings)
            with taking_long(f"loading {self.file.path}"):
                kind, value = self._connection.recv()
        except (EOFError, OSError):
            raise ModelError(f"{self._exit_reason()} while it loaded the file") from None
        if kind == "failed":
            self.close()
            reason = f"{value} (a tensor of the wrong shape?)"
            raise ModelError(f"judge {self.file.path} cannot be loaded: {reason}")
        self.threads = value

    def _exit_reason(self) -> str:
        """How the worker process ended, for an error message; cleans up after it."""
        assert self._process is not None
        status = self._process.wait()
        if status < 0:
            how = signal.Signals(-status).name
        else:
            self._output.seek(0)
            lines = self._output.read().decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            how = f"exit code {status}: {last}"
        self.close()
        return f"judge {self.file.path}: its process died ({how})"

    def close(self) -> None:
        """End the worker process. Scoring again starts another."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
            self._output.close()
            self._process = None

    def __str__(self) -> str:
        settings = f"context {self.context_length}, threads {self.threads}"
        return f"{self.file.path}: template {self.template_name}, {settings}"


class _TextEncoder:
    """Splits a text into ids of control tokens and plain text.

    Control tokens become ids in a template, never in a user's text."""

    def __init__(self, file: GGUFFile):
        self.path = file.path
        kinds = list(zip(file.tokens, file.token_types, strict=True))
        self.ids = {token: index for index, token in enumerate(file.tokens)}
        long = [(token, kind) for token, kind in kinds if len(token) > 1]
        control_kinds = (TokenType.CONTROL, TokenType.USER_DEFINED)
        control = [re.escape(token) for token, kind in long if kind in control_kinds]
        special = [re.escape(token) for token, kind in long if kind != TokenType.NORMAL]
        self._control = re.compile("|".join(sorted(control, key=len, reverse=True)) or "(?!)")
        self._special = re.compile(f"(?={'|'.join(special)})")
        self._space = " " if file.metadata.get("tokenizer.ggml.add_space_prefix", True) else ""
        bos = file.metadata.get("tokenizer.ggml.bos_token_id", 1)
        self._bos = [bos] if file.metadata.get("tokenizer.ggml.add_bos_token", True) else []
        self.leading = "".join(file.tokens[index] for index in self._bos)

    def spellings(self, words: Sequence[str]) -> list[int]:
        """Ids of the tokens that spell one of the words, alone or after a space."""
        pieces = [piece for word in words for piece in (word, f"▁{word}")]
        ids = [self.ids[piece] for piece in pieces if piece in self.ids]
        if not ids:
            reason = f"its vocabulary has no token {' or '.join(words)}"
            raise ModelError(f"judge {self.path} cannot be used: {reason}")
        return ids

    def plain(self, text: str) -> list[Item]:
        """A user's text. Raises UnicodeEncodeError.

        Text that reads like a special token is cut in two, so that its pieces cannot merge into the
        token. A NUL, at which the library would end the text, becomes its byte token."""
        text.encode()
        items: list[Item] = []
        for part in text.split("\0"):
            cuts = [0, *(match.start() + 1 for match in self._special.finditer(part)), len(part)]
            items += [part[start:end] for start, end in pairwise(cuts) if start < end]
            items.append(self.ids["<0x00>"])
        return items[:-1]

    def control(self, template: str, prompt: str = "", is_start: bool = False) -> list[Item]:
        """A template's text with the prompt in it. is_start: it is the start of the whole text.

        As in Hugging Face's LLaMA tokenizer there is a space at the start of a text and after a
        control token."""
        items: list[Item] = list(self._bos) if is_start else []
        end = 0
        for match in [*self._control.finditer(template), None]:
            text = template[end : match.start() if match else None]
            if text:
                space = self._space if is_start or end else ""
                items += self.plain(space + text.replace("{prompt}", prompt))
            if match:
                items.append(self.ids[match[0]])
                end = match.end()
        return items


# --- in the worker process ---


def _serve(descriptor: int) -> None:
    """Score or count what arrives through the pipe until the pipe is closed."""
    # Ctrl-C goes to the whole process group; the parent process decides what to do
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
            request = connection.recv()
            if isinstance(request, tuple):
                groups, question, unscored = request
                model.score(groups, question, unscored, connection)
            else:
                connection.send([len(model._ids(text)) for text in request])
    except (EOFError, OSError):  # the parent process has ended
        return


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
        self.path, self.context_length = settings["path"], settings["context_length"]
        self.yes, self.no = settings["yes"], settings["no"]
        self.thoughts = settings["thoughts"]
        self.edge = len(self._tokenize(EDGE))
        # the groups of tokens whose keys and values are in the cache
        self.held: list[list[int]] = []
        self.threads = self._choose_threads(settings["threads"])

    def _choose_threads(self, threads: int | None) -> int:
        """`threads`, at most all cores. By default 1, or all cores if the model is large and a
        trial with all cores is clearly faster.

        Threads without a free core wait for each other in a busy loop, which can be a hundred times
        slower than one thread; and a small model gains little from more threads."""
        has_affinity = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
        if threads or cores == 1 or os.path.getsize(self.path) < SMALL:
            return min(threads or 1, cores)
        seconds = {}
        for self.threads in (1, 1, cores):  # the first call is a warm-up
            start = time.perf_counter()
            self._evaluate([0] * min(16, self.context_length), 0)
            seconds[self.threads] = time.perf_counter() - start
        return cores if seconds[cores] * 1.3 < seconds[1] else 1

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

    def score(
        self, texts: list[list[Item]], question: list[Item], unscored: int, connection: Connection
    ) -> None:
        """Send the score of every step. texts: the text before the steps, then one text for each
        step; the first `unscored` steps are context.

        The last bits of a result depend on which tokens are evaluated together. So each text is a
        group that is evaluated on its own, and the cache is kept in whole groups: the result does
        not depend on what was in the cache."""
        groups, question_ids = [self._ids(text) for text in texts], self._ids(question)
        total = sum(map(len, groups)) + len(question_ids)
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
                self._evaluate(question_ids, past)
                del self.held[k + 1 :]  # the question overwrote the groups after this one
                evaluated += len(question_ids)
                if self.thoughts and self._begins_thought():
                    connection.send(("thinks", None))
                    return
                self.thoughts = []  # the first verdict tells
                score = self._answer()
                if not math.isfinite(score):
                    connection.send(("not finite", None))
                    return
                connection.send(("score", score))
        connection.send(("done", evaluated))

    def _begins_thought(self) -> bool:
        """Whether the likeliest next token opens the model's thoughts."""
        logits = self.llm.ctransformers_llm_logits_data()
        vocabulary = range(self.llm.ctransformers_llm_vocab_size())
        return max(vocabulary, key=logits.__getitem__) in self.thoughts

    def _answer(self) -> float:
        """P(yes) / (P(yes) + P(no)) of the next token."""
        logits = self.llm.ctransformers_llm_logits_data()
        top = max(logits[index] for index in self.yes + self.no)
        yes, no = (
            sum(math.exp(logits[index] - top) for index in ids) for ids in (self.yes, self.no)
        )
        return yes / (yes + no)
