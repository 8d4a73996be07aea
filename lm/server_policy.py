"""A policy on an OpenAI-compatible server (vLLM, SGLang, llama.cpp, `transformers serve`).

It has the methods of `Policy`, and its states have text instead of token ids.
"""

import asyncio
import sys
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any, TypeVar

from common.errors import PromptTooLong, ServerError, UserError, short
from common.progress import Bar
from common.terminal import printable
from lm.loading import load_tokenizer
from lm.openai_client import OpenAIServer, TooLong, gather
from lm.policy import Policy, Response, State, StepLogp, check_open
from lm.prompting import FIELD, USUAL, Style, is_chat, prompts_of, set_prompts
from lm.text_encoding import format_prompt
from lm.thinking import answer_start, open_thought
from reasoning.steps import ends_solution, one_line

# a note is printed if a call has at least so many samples and all samples of each state are equal
ALIKE = 16

T = TypeVar("T")


@dataclass(frozen=True)
class _Reply:
    text: str
    tokens: int
    reason: str | None  # finish_reason: `stop` is EOS or our stop text, all others are limits
    is_eos: bool  # the server reports EOS (vLLM's stop_reason); most servers do not


class ServerPolicy(Policy):
    """A model behind the /completions of an OpenAI-compatible server.

    base_url: `http://localhost:8000/v1`. model: the server's name of the model. If it is also a
    directory or a hub name with a tokenizer, prompts are written with the tokenizer's chat
    template, else with the plain template; which of the two is printed. in_flight, timeout,
    max_retries: as in OpenAIServer.

    States have no ids, so methods that need ids are refused. Every sample is a request of its own,
    because servers treat `n` differently. Its seed depends on seed, prompt, steps and sample: a
    server that honours it repeats its samples (`transformers serve` only with in_flight=1).

    Raises ServerError if the server cannot be used, and PromptTooLong."""

    def __init__(
        self,
        base_url: str,
        model: str,
        in_flight: int = 16,
        timeout: float = 300.0,
        max_retries: int = 5,
        style: Style = USUAL,
    ):
        self.style = style
        self._server = OpenAIServer("policy", base_url, in_flight, timeout, max_retries)
        self._name = model
        self._notes: set[str] = set()
        self._too_long: list[State] = []  # states of the last call that fill the context
        self._bos = ""
        try:
            self.tokenizer = load_tokenizer(model)
        except (OSError, ValueError, ImportError):
            self.tokenizer = SimpleNamespace(name_or_path=model, chat_template=None, init_kwargs={})
            template = f"the plain template: no tokenizer of {model} can be loaded here"
        else:
            bos = self.tokenizer.bos_token
            if bos and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]:
                self._bos = bos
            if is_chat(self.tokenizer):
                template = f"the chat template of {model}"
            else:
                template = f"the plain template: {model} has no chat template"
        self._note(f"prompts are written with {template}")
        prompts = style.prompts
        if not is_chat(self.tokenizer):  # a chat is written by the server's template
            prompts = replace(prompts, system_prompt=None)
        set_prompts(self.tokenizer, prompts)

    def start(self, prompt: str, steps: Sequence[str] = ()) -> State:
        """As in Policy, but a state that fills the context is found only when it is continued."""
        status = "finished" if ends_solution(list(steps)) else "open"
        return State(prompt, (), (), tuple(steps), status)

    def generate(self, prompts: Sequence[str], *args: Any, **kwargs: Any) -> list[list[Response]]:
        responses = super().generate(prompts, *args, **kwargs)
        if self._too_long:
            raise self._no_room(self._too_long[0].prompt)
        return responses

    def texts(
        self,
        prompts: Sequence[str],
        temperature: float = 0.0,
        top_p: float | None = None,
        max_new_tokens: int = 256,
        seed: int = 0,
        chat: bool = False,
    ) -> list[tuple[str, bool]]:
        """As in Policy. A chat goes to /chat/completions, with the server's own template."""
        if chat:
            self._note("chats are written with the server's template")

        async def ask(prompt: str) -> tuple[str, bool]:
            text = prompt if chat else self._prompt(prompt)
            settings = self._settings((seed, prompt), temperature, top_p)
            try:
                reply = await self._complete(text, max_new_tokens, settings, chat)
            except TooLong:
                raise self._no_room(prompt) from None
            text = self._without_thoughts(reply.text).strip()
            return self._in_lines(text), reply.reason == "stop"

        return self._all([ask(prompt) for prompt in prompts])

    def stream(
        self, prompt: str, temperature: float = 0.0, max_new_tokens: int = 256, seed: int = 0
    ) -> Iterator[str]:
        """The text of one response, in one piece."""
        ((response,),) = self.generate([prompt], 1, temperature, max_new_tokens, seed)
        yield "\n".join(response.steps)

    def step_logps(
        self,
        rows: Sequence[tuple[str, list[str], list[str]]],
        progress: str | None = None,
        batch_size: int = 32,
    ) -> list[list[StepLogp]]:
        raise ServerError(
            f"{self._server}: log-probs need token ids, but a server gives text: "
            "leave out --policy_base_url to load the model here"
        )

    def _sample(
        self,
        states: Sequence[State],
        n: int,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        progress: str | None,
        one_step: bool,
    ) -> list[list[State]]:
        check_open(states)
        self._too_long = []
        # all greedy samples of a state are the same
        samples = [[(state, k if temperature else 0) for k in range(n)] for state in states]
        asked = list(dict.fromkeys(sample for group in samples for sample in group))

        async def ask(state: State, sample: int) -> State:
            key = (seed, state.prompt, state.steps, sample)
            settings = self._settings(key, temperature)
            child = await self._next_state(state, max_new_tokens, settings, one_step)
            bar.update()
            return child

        with Bar(total=len(asked), desc=progress, unit="sample", disable=progress is None) as bar:
            answers = self._all([ask(state, sample) for state, sample in asked])
        found = dict(zip(asked, answers, strict=True))
        children = [[found[sample] for sample in group] for group in samples]
        sampled = temperature and n > 1 and len(asked) >= ALIKE
        if sampled and all(len({child.steps for child in group}) == 1 for group in children):
            self._note(
                f"all {n} samples of a state are equal at temperature {temperature:g}: "
                "does the server sample? (`transformers serve` does so only if the "
                'generation_config.json of its model has "do_sample": true)'
            )
        return children

    async def _next_state(
        self, state: State, max_new_tokens: int, settings: dict[str, Any], one_step: bool
    ) -> State:
        if not self.style.has_plain_steps:
            return await self._next_parts(state, max_new_tokens, settings, one_step)
        text = self._prompt(state.prompt, state.steps)
        if one_step:
            settings = settings | {"stop": ["\n"]}
        try:
            reply = await self._complete(text, max_new_tokens, settings)
            sampled = reply.tokens
            is_blank = one_step and not reply.text.strip()
            if is_blank and reply.reason == "stop" and not reply.is_eos:
                # the end of the solution, or an empty line before a step: ask again behind the line
                limit = max(1, max_new_tokens - sampled)
                reply = await self._complete(f"{text}\n", limit, settings)
                sampled += reply.tokens
        except TooLong:
            self._too_long.append(state)
            return State(state.prompt, (), (), state.steps, "cut")
        written, newline = reply.text, ""
        if one_step:
            # some servers return the newline, or do not stop at it
            written, newline, _ = written.lstrip().partition("\n")
        steps = (*state.steps, *(one_line(line) for line in written.split("\n") if line.strip()))
        if newline:
            status = "open"
        elif reply.reason != "stop":
            status = "cut"
        else:
            status = "open" if one_step and written and not reply.is_eos else "finished"
        if status == "open" and ends_solution(list(steps)):
            status = "finished"
        if steps and not state.steps:
            self._check_answer(steps[0])
        return State(state.prompt, (), (), steps, status, sampled)

    async def _next_parts(
        self, state: State, max_new_tokens: int, settings: dict[str, Any], one_step: bool
    ) -> State:
        """As `_next_state`, where a step is not a line of the text.

        The reply goes to its own end, since a server stops at no regular expression. Of one step
        the rest is thrown away, and counted."""
        if self.style.cuts_thoughts and (one_step or state.steps):
            raise UserError(
                "argument --thinking: a server cannot go on behind thoughts that are cut, step by "
                "step: keep them (--thinking keep), or leave out --policy_base_url or the search"
            )
        text = self._prompt(state.prompt, state.steps)
        try:
            reply = await self._complete(text, max_new_tokens, settings)
        except TooLong:
            self._too_long.append(state)
            return State(state.prompt, (), (), state.steps, "cut")
        written, separator = self._without_thoughts(reply.text), self.style.separator
        status = "finished" if reply.reason == "stop" else "cut"
        end = separator.end(written) if one_step else None
        if end is not None:
            written = written[:end]
        steps = (*state.steps, *separator.split(written))
        if end is not None and not ends_solution(list(steps)):
            status = "open"
        elif end is not None:
            status = "finished"
        if steps and not state.steps:
            self._check_answer(steps[0])
        return State(state.prompt, (), (), steps, status, reply.tokens)

    def _without_thoughts(self, text: str) -> str:
        """A reply without its thoughts, if they are cut."""
        if not self.style.cuts_thoughts:
            return text
        behind = format_prompt(FIELD, self.tokenizer, thinks=True).rpartition(FIELD)[2]
        opened = open_thought(behind)
        return text[max(0, answer_start(opened + text) - len(opened)) :]

    def count_tokens(self, texts: Sequence[str]) -> None:
        """None: a server does not show its tokens."""
        return None

    def _prompt(self, prompt: str, steps: Sequence[str] = ()) -> str:
        """The text to be continued, without BOS, which the server adds."""
        if self.style.prompts.system_prompt is not None:
            set_prompts(self.tokenizer, self.style.prompts)  # refused without a chat template
        before = format_prompt(prompt, self.tokenizer, thinks=self.style.thinks)
        pieces = [step + self.style.separator.joint for step in steps]
        return (before + "".join(pieces)).removeprefix(self._bos)

    def _no_room(self, prompt: str) -> PromptTooLong:
        return PromptTooLong(
            f"{self._server}: no room in the model's context behind {short(prompt)}"
        )

    async def _complete(
        self, text: str, max_tokens: int, settings: dict[str, Any], chat: bool = False
    ) -> _Reply:
        """The server's reply to one text.

        Servers refuse a request for more tokens than the context has room for: then half as many
        are asked for, down to one. Raises TooLong if there is no room for one."""
        content: dict[str, Any] = {"prompt": text}
        if chat:
            system = self.style.prompts.system_prompt or prompts_of(self.tokenizer).system_prompt
            turns = [("system", system), ("user", text)]
            content = {"messages": [{"role": r, "content": c} for r, c in turns if c is not None]}
        body = {"model": self._name, **content, "max_tokens": max_tokens, **settings}
        return await self._server.ask("chat" if chat else "text", body, self._read, least_tokens=1)

    def _read(self, answer: Any) -> _Reply:
        choice = answer["choices"][0]
        text = choice["message"]["content"] or "" if "message" in choice else choice["text"]
        text = self._server.own_text(text)
        tokens = (answer.get("usage") or {}).get("completion_tokens")
        if tokens is None:
            self._note("the server does not count tokens: words are counted instead")
            tokens = len(text.split())
        reason = choice["finish_reason"]
        # vLLM names what stopped it; TGI's `eos_token` is EOS and its `stop_sequence` a stop text
        is_eos = reason == "eos_token" or choice.get("stop_reason", "\n") != "\n"
        reason = "stop" if reason in ("eos_token", "stop_sequence") else reason
        return _Reply(text, int(tokens), reason, is_eos)

    def _settings(
        self, key: tuple, temperature: float, top_p: float | None = None
    ) -> dict[str, Any]:
        """Settings of a request; its seed, in 0 .. 2^31 - 1, is a hash of the key."""
        digest = blake2b(repr(key).encode(errors="surrogatepass"), digest_size=4).digest()
        seed, top_p = int.from_bytes(digest) >> 1, self.style.top_p if top_p is None else top_p
        top_k = {"top_k": self.style.top_k} if self.style.top_k else {}  # OpenAI's own has none
        return {"seed": seed, "temperature": temperature, "top_p": top_p, **top_k}

    def _all(self, requests: list[Coroutine[Any, Any, T]]) -> list[T]:
        async def ask_all() -> list[T]:
            async with self._server.open():
                return await gather(requests)

        return asyncio.run(ask_all())

    def _note(self, note: str) -> None:
        """Print a note on stderr, once."""
        if note not in self._notes:
            self._notes.add(note)
            print(printable(f"{self._server}: {note}"), file=sys.stderr)
