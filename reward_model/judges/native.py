"""What the two judges of GGUF files share: the process of their library, and how it is asked.

The libraries of both can end their process on input that they do not expect. So the file
(lm/gguf_file.py) and the lengths are checked first, and the library runs in a process of its own,
which speaks with the judge through a pipe. The judge sends texts as lists of items: the ids of
control tokens, and plain text.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Protocol

from common.errors import JudgeError, ModelError
from common.files import ROOT
from common.progress import taking_long
from lm.chat_template import begins_thought
from lm.gguf_file import GGUFFile, TokenType
from lm.text_encoding import IN_BRACKETS
from reward_model.protocols import Scores, Solution, StepJudge, describe_step, nan_error, with_skip
from reward_model.templates import JudgeTemplate, gguf_template, named_template, unusable_template

MAX_CONTEXT = 4096  # default limit in tokens, since the cache grows with the context
SMALL = 50_000_000  # bytes; with a smaller file one thread is enough
SPACE, NEWLINE = "▁Ġ", "Ċ"  # how vocabularies write a space and a newline

Item = int | str  # a token id, or text to be tokenized


@dataclass(frozen=True)
class Question:
    """What is asked about every step of every solution."""

    head: list[Item]  # the text before the prompt, as far as it is a text of its own
    text: list[Item]  # what stands behind the steps
    thoughts: Sequence[int]  # ids of tokens that open a model's thoughts


class TextEncoder:
    """Splits a text into ids of control tokens and plain text.

    Control tokens become ids in a template, never in a user's text."""

    leading_ids: list[int]  # what stands in front of every text (BOS)
    space = ""  # what the start of a text, and of a text after a control token, must begin with

    def __init__(self, file: GGUFFile):
        self.tokens = file.tokens
        self.ids = {token: index for index, token in enumerate(file.tokens)}
        kinds = zip(file.tokens, file.token_types, strict=True)
        long = [(token, kind) for token, kind in kinds if len(token) > 1]
        templates = "".join(map(str, file.chat_templates.values()))

        def is_added(token: str) -> bool:
            """Whether a token stands for plain text, such as a run of spaces."""
            return not IN_BRACKETS.fullmatch(token) and token not in templates

        control_kinds = (TokenType.CONTROL, TokenType.USER_DEFINED)
        control = [re.escape(token) for token, kind in long if kind in control_kinds]
        special = [
            re.escape(token)
            for token, kind in long
            if kind != TokenType.NORMAL and not (kind == TokenType.USER_DEFINED and is_added(token))
        ]
        self._control = re.compile("|".join(sorted(control, key=len, reverse=True)) or "(?!)")
        self._special = re.compile(f"(?={'|'.join(special) or '(?!)'})")

    @property
    def leading(self) -> str:
        return "".join(self.tokens[index] for index in self.leading_ids)

    def cut(self, text: str) -> list[str]:
        """A user's text in pieces: a word that reads like a control token is cut in two, so that
        its pieces cannot merge into the token. Raises UnicodeEncodeError."""
        text.encode()
        cuts = [0, *(match.start() + 1 for match in self._special.finditer(text)), len(text)]
        return [text[start:end] for start, end in pairwise(cuts) if start < end]

    def plain(self, text: str) -> list[Item]:
        """The items of a user's text. Raises UnicodeEncodeError."""
        raise NotImplementedError

    def control(self, template: str, prompt: str = "", is_start: bool = False) -> list[Item]:
        """A template's text with the prompt in it. is_start: it is the start of the whole text."""
        items: list[Item] = list(self.leading_ids) if is_start else []
        end = 0
        for match in [*self._control.finditer(template), None]:
            text = template[end : match.start() if match else None]
            if text:
                space = self.space if is_start or end else ""
                items += self.plain(space + text.replace("{prompt}", prompt))
            if match:
                items.append(self.ids[match[0]])
                end = match.end()
        return items


class NativeJudge(StepJudge):
    """A StepJudge on a GGUF file, whose library runs in a process of its own.

    The module of a subclass has a class `_Model`, which the process makes of the judge's
    `_settings` (see `NativeModel`). After `_start` and `_choose_template` the judge can score."""

    file: GGUFFile
    context_length: int  # tokens
    threads: int
    template_name: str
    template: JudgeTemplate
    tokens_evaluated = 0
    _text: TextEncoder
    _settings: dict[str, Any]  # with "path"
    _process: subprocess.Popen | None = None
    # ids of tokens that open a model's thoughts, until the first verdict was none of them
    _thoughts: Sequence[int] = ()

    def _choose_template(self, template: str | JudgeTemplate | None) -> None:
        """The given template, or the file's own. Raises JudgeError."""
        if isinstance(template, JudgeTemplate):
            self.template_name, self.template = "given", template
        elif template is not None:
            self.template_name, self.template = template, named_template(template)
        else:
            self.template_name, self.template = gguf_template(self.file, self._text.leading)
        if self.template_name == "chat":
            # where the verdict is read, a model that begins to think has none yet
            self._thoughts = [
                k for k, token in enumerate(self.file.tokens) if begins_thought(spaced(token))
            ]

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
        question = Question(
            self._text.control(self.template.before.partition("{prompt}")[0], is_start=True),
            self._text.control(self.template.question),
            self._thoughts,
        )
        scores: list[float] = []
        try:
            self._start()
            self._connection.send((question, before, lines, skip))
            while (reply := self._connection.recv())[0] == "score":
                self._thoughts = ()  # the first verdict tells
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

        It imports the library and nothing else that is heavy, and ends when its pipe is closed."""
        if self._process is not None:
            return
        self._connection, theirs = Pipe()
        # what the library prints, for the error message if it fails
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process runs)
        # for what the library keeps in files as long as it runs
        self._folder = tempfile.TemporaryDirectory()
        module = type(self).__module__
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module} as judge; "
        code += f"from {__name__} import serve; serve({theirs.fileno()}, judge._Model)"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
        )
        theirs.close()
        try:
            self._connection.send({**self._settings, "folder": self._folder.name})
            with taking_long(f"loading {self.file.path}"):
                kind, value = self._connection.recv()
        except (EOFError, OSError):
            raise ModelError(f"{self._exit_reason()} while it loaded the file") from None
        if kind == "failed":
            reason = self._load_error(value, self._printed())
            self.close()
            raise ModelError(f"judge {self.file.path} cannot be loaded: {reason}")
        self._loaded(value)

    def _loaded(self, facts: dict[str, Any]) -> None:
        """Take in what the process says about the model when it has loaded it."""
        self.threads = facts["threads"]

    @abstractmethod
    def _load_error(self, error: str, printed: list[str]) -> str:
        """Why the library could not load the file, from its error and the lines it printed."""

    def _printed(self) -> list[str]:
        """The lines that the process has printed."""
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").split("\n")
        return [line.strip() for line in lines if line.strip()]

    def _exit_reason(self) -> str:
        """How the worker process ended, for an error message; cleans up after it."""
        assert self._process is not None
        status = self._process.wait()
        if status < 0:
            how = signal.Signals(-status).name
        else:
            how = f"exit code {status}: {''.join(self._printed()[-1:])}"
        self.close()
        return f"judge {self.file.path}: its process died ({how})"

    def close(self) -> None:
        """End the worker process. Scoring again starts another."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
            self._output.close()
            self._folder.cleanup()
            self._process = None

    def __str__(self) -> str:
        settings = f"context {self.context_length}, threads {self.threads}"
        return f"{self.file.path}: template {self.template_name}, {settings}"


# --- the vocabulary ---


def spaced(token: str) -> str:
    """The text of a token, as far as marks of thoughts need it."""
    return re.sub(f"[{SPACE}]", " ", token).replace(NEWLINE, "\n")


def spellings(file: GGUFFile, words: Sequence[str]) -> list[int]:
    """Ids of the tokens that spell one of the words, alone or after a space.

    Raises ModelError if there are none."""
    ids = {token: index for index, token in enumerate(file.tokens)}
    pieces = [piece for word in words for piece in (word, *(space + word for space in SPACE))]
    found = [ids[piece] for piece in pieces if piece in ids]
    if not found:
        reason = f"its vocabulary has no token {' or '.join(words)}"
        raise ModelError(f"judge {file.path} cannot be used: {reason}")
    return found


# --- in the worker process ---


class NativeModel(Protocol):
    """The library's model, made of a judge's `_settings` and the "folder" that it may use.

    Making it raises RuntimeError, ValueError or OSError if the file cannot be loaded."""

    facts: dict[str, Any]  # what the judge is told: "threads" and whatever its `_loaded` needs

    def score(
        self,
        question: Question,
        before: list[Item],
        lines: list[list[Item]],
        skip: int,
        send: Callable[[tuple[str, Any]], None],
    ) -> tuple[str, Any]:
        """Send ("score", score) for every step behind the first `skip` steps. before: the template
        with the prompt; lines: the steps.

        Returns ("done", number of tokens evaluated), or what hinders it: ("too long", None) before
        anything is evaluated, ("not finite", None), or ("thinks", None) if the likeliest first
        token of an answer is one of `question.thoughts`."""
        ...

    def count(self, text: list[Item]) -> int:
        """The number of tokens of a text."""
        ...


def serve(descriptor: int, load: Callable[[dict], NativeModel]) -> None:
    """Score or count what arrives through the pipe until the pipe is closed."""
    # Ctrl-C goes to the whole process group; the parent process decides what to do
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    settings = connection.recv()
    try:
        model = load(settings)
    except (RuntimeError, ValueError, OSError) as error:
        connection.send(("failed", str(error)))
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the library may have set its own
    connection.send(("ready", model.facts))
    try:
        while True:
            request = connection.recv()
            if isinstance(request, tuple):
                question, before, lines, skip = request
                reply = model.score(question, before, lines, skip, connection.send)
                connection.send(reply)
            else:
                connection.send([model.count(text) for text in request])
    except (EOFError, OSError):  # the parent process has ended
        return


def choose_threads(threads: int | None, path: str | Path, trial: Callable[[int], float]) -> int:
    """`threads`, at most all cores. By default 1, or all cores if the model is large and a trial
    with all cores is clearly faster.

    Threads without a free core wait for each other in a busy loop, which can be a hundred times
    slower than one thread; and a small model gains little from more threads. trial(n): the seconds
    that n threads need for the same work."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    if threads or cores == 1 or os.path.getsize(path) < SMALL:
        return min(threads or 1, cores)
    alone = trial(1)
    return cores if trial(cores) * 1.3 < alone else 1
