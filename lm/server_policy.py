"""A policy on an OpenAI-compatible server (vLLM, SGLang, llama.cpp, `transformers serve`): the same proposals, as text."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer

from common.errors import PromptTooLong, ServerError, short
from lm.openai_client import OpenAIServer, TooLong, gather
from lm.policy import Policy, Response, State, StepLogp
from lm.text_encoding import format_prompt, response_pieces
from reasoning.steps import ends_solution, one_line

ALIKE = (
    16  # samples: if there are so many and none differs from the others of its state, it is said
)


@dataclass(frozen=True)
class _Reply:
    text: str
    tokens: int
    reason: str | None  # finish_reason: `stop` is EOS or our stop, all else a limit
    told_eos: bool  # vLLM's stop_reason tells the two apart


class RemotePolicy(Policy):
    """The model that the server at base_url (`http://localhost:8000/v1`) knows by this name; its /completions are asked.

    Prompts are written with the chat template of the model's tokenizer, if the name is also a directory or a hub name from which
    one can be loaded, else with the plain template; which is said. States have no ids, so what needs them is refused. One request
    a sample, since servers differ in what they do with `n`. Its seed comes from seed, prompt, steps and sample: a server that
    honours it gives the same samples again (`transformers serve` with in_flight=1 only). in_flight, timeout, max_retries: as in
    OpenAIServer. Raises ServerError, one line, for a server that cannot be used."""

    def __init__(
        self,
        base_url: str,
        model: str,
        in_flight: int = 16,
        timeout: float = 300.0,
        max_retries: int = 5,
    ):
        self._server, self._name = (
            OpenAIServer("policy", base_url, in_flight, timeout, max_retries),
            model,
        )
        self._said: set[str] = set()
        self._overflown: list[State] = []
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            chat = self.tokenizer.chat_template is not None
            template = (
                f"the chat template of {model}"
                if chat
                else f"the plain template: {model} has no chat template"
            )
        except (OSError, ValueError, ImportError):
            self.tokenizer, template = (
                None,
                f"the plain template: no tokenizer of {model} can be loaded here",
            )
        self._say(f"prompts are written with {template}")
        bos = self.tokenizer.bos_token if self.tokenizer else None
        self._bos = (
            bos
            if bos and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
            else ""
        )

    def start(self, prompt: str, steps: Sequence[str] = ()) -> State:
        """As Policy's, but nothing is asked: what outgrows the model's context is found when it should go on, and `cut` there."""
        return State(
            prompt, (), (), tuple(steps), "finished" if ends_solution(list(steps)) else "open"
        )

    def generate(self, prompts: Sequence[str], *args, **kwargs) -> list[list[Response]]:
        answers = super().generate(prompts, *args, **kwargs)
        if self._overflown:
            raise PromptTooLong(
                f"{self._server}: no room in the model's context behind {short(self._overflown[0].prompt)}"
            )
        return answers

    def texts(
        self, prompts, temperature=0.0, top_p=1.0, max_new_tokens=256, seed=0, chat=False
    ) -> list[tuple[str, bool]]:
        """As Policy's. A chat is the server's: /chat/completions is asked, and its template frames the prompt."""
        if chat:
            self._say("chats are framed by the server's template")

        async def ask(prompt: str) -> tuple[str, bool]:
            # the server adds it
            text = prompt if chat else format_prompt(prompt, self.tokenizer).removeprefix(self._bos)
            key = repr((seed, prompt)).encode(errors="surrogatepass")
            settings = {"seed": int.from_bytes(blake2b(key, digest_size=4).digest()) >> 1}
            try:
                reply = await self._complete(
                    text,
                    max_new_tokens,
                    settings | {"temperature": temperature, "top_p": top_p},
                    chat,
                )
            except TooLong:
                raise PromptTooLong(
                    f"{self._server}: no room in the model's context behind {short(prompt)}"
                ) from None
            return reply.text.strip(), reply.reason == "stop"

        async def ask_all() -> list[tuple[str, bool]]:
            async with self._server.open():
                return await gather([ask(prompt) for prompt in prompts])

        return asyncio.run(ask_all())

    def stream(
        self, prompt: str, temperature: float = 0.0, max_new_tokens: int = 256, seed: int = 0
    ) -> Iterator[str]:
        """The text of one response, in one piece."""
        ((response,),) = self.generate([prompt], 1, temperature, max_new_tokens, seed)
        yield "\n".join(response.steps)

    def step_logps(
        self, rows: Sequence, progress: str | None = None, batch_size: int = 32
    ) -> list[list[StepLogp]]:
        raise ServerError(
            f"{self._server}: log-probs need token ids, a server gives text: take a model without --policy_base_url"
        )

    def _go_on(
        self, states, n, temperature, max_new_tokens, seed, progress, one_step
    ) -> list[list[State]]:
        if closed := [state for state in states if state.status != "open"]:
            raise ValueError(
                f"a state that is {closed[0].status} cannot go on: {closed[0].steps[-1:]}"
            )
        self._overflown = []
        # greedy samples are all one
        of_states = [[(state, k if temperature else 0) for k in range(n)] for state in states]
        asked = list(dict.fromkeys(sample for of_state in of_states for sample in of_state))

        async def ask_all() -> list[State]:
            async def ask(state: State, sample: int) -> State:
                child = await self._child(
                    state, sample, temperature, max_new_tokens, seed, one_step
                )
                bar.update()
                return child

            async with self._server.open():
                return await gather([ask(state, sample) for state, sample in asked])

        with tqdm(total=len(asked), desc=progress, unit="sample", disable=progress is None) as bar:
            found = dict(zip(asked, asyncio.run(ask_all()), strict=True))
        children = [[found[sample] for sample in of_state] for of_state in of_states]
        if (
            temperature
            and n > 1
            and len(asked) >= ALIKE
            and all(len({child.steps for child in group}) == 1 for group in children)
        ):
            self._say(
                f"{n} samples of a beginning are all alike at temperature {temperature:g}: does the server sample? "
                '(`transformers serve` does where the generation_config.json of its model has "do_sample": true)'
            )
        return children

    async def _child(self, state, sample, temperature, max_new_tokens, seed, one_step) -> State:
        key = repr((seed, state.prompt, state.steps, sample)).encode(errors="surrogatepass")
        settings = {
            "seed": int.from_bytes(blake2b(key, digest_size=4).digest()) >> 1,
            "temperature": temperature,
            "top_p": 1,
        }
        settings |= {"stop": ["\n"]} if one_step else {}
        text = format_prompt(state.prompt, self.tokenizer) + "".join(
            response_pieces(list(state.steps), finished=False)
        )
        text = text.removeprefix(self._bos)  # the server adds it
        try:
            reply = await self._complete(text, max_new_tokens, settings)
            sampled = reply.tokens
            if (
                one_step
                and not reply.text.strip()
                and reply.reason == "stop"
                and not reply.told_eos
            ):
                # the end of the solution, or an empty line before the next step: what comes behind one tells
                reply = await self._complete(
                    f"{text}\n", max(1, max_new_tokens - sampled), settings
                )
                sampled += reply.tokens
        except TooLong:
            self._overflown.append(state)
            return State(state.prompt, (), (), state.steps, "cut")
        written, newline = reply.text, ""
        if one_step:
            # some servers give the newline, or do not stop there
            written, newline, _ = written.lstrip().partition("\n")
        steps = (*state.steps, *(one_line(line) for line in written.split("\n") if line.strip()))
        if newline:
            status = "open"
        elif reply.reason != "stop":
            status = "cut"
        else:
            status = "open" if one_step and written and not reply.told_eos else "finished"
        if status == "open" and ends_solution(list(steps)):
            status = "finished"
        return State(state.prompt, (), (), steps, status, sampled)

    async def _complete(
        self, text: str, max_tokens: int, settings: dict, chat: bool = False
    ) -> _Reply:
        """Servers refuse to write more than the context has room for: then less is asked for, and if one token is too many
        TooLong is raised."""
        while True:
            try:
                framed = (
                    {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
                )
                body = {"model": self._name, **framed, "max_tokens": max_tokens, **settings}
                return await self._server.ask("chat" if chat else "text", body, self._read)
            except TooLong:
                if max_tokens == 1:
                    raise
                max_tokens //= 2

    def _read(self, answer: Any) -> _Reply:
        choice = answer["choices"][0]
        text = (choice["message"]["content"] or "" if "message" in choice else choice["text"]) + ""
        tokens = (answer.get("usage") or {}).get("completion_tokens")
        if tokens is None:
            self._say("the server does not count tokens: words are counted instead")
            tokens = len(text.split())
        return _Reply(
            text,
            int(tokens),
            choice["finish_reason"],
            "stop_reason" in choice and choice["stop_reason"] != "\n",
        )

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            print(f"{self._server}: {what}", file=sys.stderr)
