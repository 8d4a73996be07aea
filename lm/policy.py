"""The policy: next steps, whole solutions and their log-probs, for many prefixes at once.

`Policy` runs a model in this process (lm/decoding.py is its engine). `ServerPolicy` in
lm/server_policy.py has the same methods and asks a server.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from common.errors import ModelError, PromptTooLong
from common.progress import Bar
from lm.chat_template import check_answer
from lm.decoding import Decoder, DecodingRow
from lm.known_words import tokens_of
from lm.loading import load_model, scoring_device
from lm.prompting import USUAL, Style, set_prompts
from lm.text_encoding import encode_prompt, encode_steps
from reasoning.steps import NEWLINE


@dataclass(frozen=True)
class State:
    """A prompt with the first steps of a solution, or with all of them.

    ids: the template with the prompt, then the steps, with EOS if the solution is finished. Sampled
    ids are kept, never tokenized again. ends[k]: the number of ids up to the end of step k, counted
    from 1; ends[0]: that of the prompt. status: `open` if it can be continued, `finished` if it
    ended by EOS, `cut` if it ended at a limit. sampled: the number of tokens sampled since the
    state that was continued. Ids behind the last end begin the next step."""

    prompt: str
    ids: tuple[int, ...]
    ends: tuple[int, ...]
    steps: tuple[str, ...] = ()
    status: str = "open"
    sampled: int = field(default=0, compare=False)

    def first(self, k: int) -> "State":
        """The open state after its first k steps; itself if it has no more."""
        if k == len(self.steps):
            return self
        ids = self.ids[: self.ends[k]] if self.ends else ()  # a state of a server has no ids
        return State(self.prompt, ids, self.ends[: k + 1], self.steps[:k])


def check_open(states: Sequence[State]) -> None:
    """Raises ValueError if a state cannot be continued."""
    if closed := [state for state in states if state.status != "open"]:
        steps = closed[0].steps[-1:]
        raise ValueError(f"a state that is {closed[0].status} cannot be continued: {steps}")


@dataclass(frozen=True)
class Response:
    """A sampled solution: its steps, whether it ended by EOS, and the number of sampled tokens."""

    steps: list[str]
    finished: bool
    tokens: int


@dataclass(frozen=True)
class StepLogp:
    """A step under a policy.

    logp: the sum of its tokens' log-probs, in nats. tokens: their number. greedy: whether each of
    them is the greedy choice."""

    logp: float
    tokens: int
    greedy: bool


class Policy:
    """A causal LM and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, style: Style = USUAL):
        self.model, self.tokenizer, self.style = model.eval(), tokenizer, style
        set_prompts(tokenizer, style.prompts)
        self.device = model.device
        eos = model.generation_config.eos_token_id
        eos_ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
        if not eos_ids:
            raise ModelError(
                f"{model.config._name_or_path}: neither its tokenizer nor its "
                "generation_config.json names an end-of-text token (EOS), so no sample would end"
            )
        self.decoder = Decoder(model, tokenizer, eos_ids, style)
        self.context = self.decoder.context

    @classmethod
    def load(cls, model_name_or_path: str, style: Style = USUAL) -> "Policy":
        """The policy of any causal LM or adapter, from a directory or the hub.

        Its dtype is that of `scoring_device`. Raises ModelError if it cannot be loaded, UserError
        if the model cannot be asked in this style."""
        device, dtype = scoring_device()
        model, tokenizer = load_model(model_name_or_path, dtype)
        return cls(model.to(device), tokenizer, style)

    def start(self, prompt: str, steps: Sequence[str] = ()) -> State:
        """The state of a prompt and the first steps of its solution, one a line.

        Raises PromptTooLong, and ValueError for steps that are no lines in this style."""
        if steps:
            if not self.style.has_plain_steps:
                raise ValueError(
                    "steps are written one a line: this style separates them otherwise"
                )
            ids, step_of = encode_steps(self.tokenizer, prompt, [], list(steps))
        else:
            ids, step_of = encode_prompt(self.tokenizer, prompt, thinks=self.style.thinks), []
        self._check_length(prompt, ids)
        finished = bool(steps) and ids[-1] == self.tokenizer.eos_token_id
        ends = [step_of.index(k) for k in range(len(steps))] + [len(ids)]
        status = "finished" if finished else "open"
        return State(prompt, tuple(ids), tuple(ends), tuple(steps), status)

    def next_steps(
        self,
        states: Sequence[State],
        n: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 64,
        seed: int = 0,
        progress: str | None = None,
    ) -> list[list[State]]:
        """n states for every open state, each one step longer, or none if only EOS or blanks came.

        Temperature 0 is greedy. The samples of a state depend on the seed, the state and the number
        of the sample alone: they are the same whatever other states are given, and a state that is
        given twice gets the same samples twice. The caches of all new states are kept, so that they
        can be continued without reading their text again. Raises ValueError for a state that is not
        open."""
        return self._sample(states, n, temperature, max_new_tokens, seed, progress, one_step=True)

    def rollouts(
        self,
        states: Sequence[State],
        n: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        seed: int = 0,
        progress: str | None = None,
    ) -> list[list[State]]:
        """n whole solutions that continue each open state by at most `max_new_tokens`.

        They are sampled as in `next_steps`. Raises ModelError for a model that thinks first."""
        return self._sample(states, n, temperature, max_new_tokens, seed, progress, one_step=False)

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
        children: list[dict[int, State]] = [{} for _ in states]
        total, prefixes = len(states) * n, [state.ids for state in states]
        begun = (
            None
            if self.style.has_plain_steps
            else [(state.ids[state.ends[0] :], len(state.steps)) for state in states]
        )
        decoded = self.decoder.decode(
            prefixes, n, temperature, max_new_tokens, seed, one_step, begun=begun
        )
        with Bar(total=total, desc=progress, unit="sample", disable=progress is None) as bar:
            for rows in decoded:
                ended = [row for row in rows if row.ended]
                for row in ended:
                    child = self._child(states[row.prefix], row)
                    children[row.prefix].update(dict.fromkeys(row.samples, child))
                bar.update(sum(len(row.samples) for row in ended))
        return [[samples[k] for k in range(n)] for samples in children]

    def _child(self, state: State, row: DecodingRow) -> State:
        start = len(state.ids)
        ids = (*state.ids, *row.ids)
        found = self.decoder.new_steps(row)
        steps = [step for _, step in found]
        if steps and not state.steps:
            self._check_answer(steps[0])
        if found:
            all_ends = (*state.ends, *(start + end for end, _ in found))
        else:  # without a new step the ids belong to the last one
            all_ends = (*state.ends[:-1], len(ids))
        status = row.ended
        if status == "step":
            status = "open" if len(ids) < self.context else "cut"
        return State(state.prompt, ids, all_ends, (*state.steps, *steps), status, len(row.ids))

    def _in_lines(self, text: str) -> str:
        """A text with one step a line, if its steps are separated otherwise."""
        separator = self.style.separator
        return text if separator == NEWLINE else "\n".join(separator.split(text))

    def _check_answer(self, text: str) -> None:
        if not self.style.thinks:
            check_answer(self.tokenizer, text)

    def generate(
        self,
        prompts: Sequence[str],
        n: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 256,
        seed: int = 0,
        progress: str | None = None,
    ) -> list[list[Response]]:
        """n responses to every prompt, sampled as in `next_steps`. Raises PromptTooLong."""
        states = [self.start(prompt) for prompt in prompts]
        solutions = self.rollouts(states, n, temperature, max_new_tokens, seed, progress)
        return [
            [Response(list(end.steps), end.status == "finished", end.sampled) for end in group]
            for group in solutions
        ]

    def texts(
        self,
        prompts: Sequence[str],
        temperature: float = 0.0,
        top_p: float | None = None,
        max_new_tokens: int = 256,
        seed: int = 0,
        chat: bool = False,
    ) -> list[tuple[str, bool]]:
        """(text with its line breaks, whether it ended by EOS) for every prompt.

        The text of a prompt does not depend on the other prompts. top_p: instead of that of the
        style. chat: the prompt alone is the user's message, without the instruction to solve it
        step by step; the model has a chat template. Raises PromptTooLong."""
        thinks = self.style.thinks
        prefixes = [encode_prompt(self.tokenizer, prompt, chat, thinks) for prompt in prompts]
        for prompt, ids in zip(prompts, prefixes, strict=True):
            self._check_length(prompt, ids)
        texts = [("", False)] * len(prompts)
        decoded = self.decoder.decode(prefixes, 1, temperature, max_new_tokens, seed, top_p=top_p)
        for row in itertools.chain.from_iterable(decoded):
            if row.ended:
                text = self.decoder.answer_text(row.ids).strip()
                self._check_answer(text)
                texts[row.prefix] = (self._in_lines(text), row.ended == "finished")
        return texts

    def stream(
        self, prompt: str, temperature: float = 0.0, max_new_tokens: int = 256, seed: int = 0
    ) -> Iterator[str]:
        """The text of one response, in pieces, as it is written. Raises PromptTooLong.

        It comes in one piece if a step is not a line of the text."""
        if not self.style.has_plain_steps:
            ((response,),) = self.generate([prompt], 1, temperature, max_new_tokens, seed)
            yield "\n".join(response.steps)
            return
        prefix, written, text = self.start(prompt).ids, "", ""
        for (row,) in self.decoder.decode([prefix], 1, temperature, max_new_tokens, seed):
            ids = row.ids[:-1] if row.ended == "finished" else row.ids
            text = self.decoder.decode_text(ids)
            if not text.endswith("\ufffd"):  # half of a character: wait for the rest
                yield text[len(written) :]
                written = text
        yield text[len(written) :]

    def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        """As in lm/known_words.py."""
        return tokens_of(self.tokenizer, texts)

    def _check_length(self, prompt: str, ids: Sequence[int]) -> None:
        if len(ids) >= self.context:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens, the policy's context holds {self.context}: "
                f"{prompt[:60]!r} ..."
            )

    def logps(
        self, rows: Sequence[tuple[str, list[str], list[str]]], progress: str | None = None
    ) -> list[float]:
        """Mean log-prob of the tokens of the steps, in nats, for rows (prompt, prefix, steps).

        Rows are cut as in `step_logps`."""
        return [
            sum(step.logp for step in steps) / max(1, sum(step.tokens for step in steps))
            for steps in self.step_logps(rows, progress)
        ]

    @torch.inference_mode()
    def step_logps(
        self,
        rows: Sequence[tuple[str, list[str], list[str]]],
        progress: str | None = None,
        batch_size: int = 32,
    ) -> list[list[StepLogp]]:
        """A StepLogp for every step of rows (prompt, prefix, steps), each given all text before it.

        Rows longer than the context are cut there, and their number is printed. A step that is cut
        off completely has 0 tokens."""
        results, cut = [], 0
        starts = range(0, len(rows), batch_size)
        for start in Bar(starts, desc=progress, unit="batch", disable=progress is None):
            batch = rows[start : start + batch_size]
            encoded = [encode_steps(self.tokenizer, *row) for row in batch]
            longest = min(self.context, max(len(ids) for ids, _ in encoded))
            # padded on the right, where causal attention never reaches it
            ids = torch.zeros(len(encoded), longest, dtype=torch.long)
            for b, (row_ids, _) in enumerate(encoded):
                cut += len(row_ids) > longest
                ids[b, : len(row_ids)] = torch.tensor(row_ids[:longest])
            ids = ids.to(self.device)
            logits = self.model(input_ids=ids).logits[:, :-1].float()  # (B, T-1, V)
            greedy = (logits.argmax(-1) == ids[:, 1:]).tolist()
            logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].tolist()
            for b, (_, step_of) in enumerate(encoded):
                steps = [StepLogp(0, 0, True) for _ in batch[b][2]]
                for place, k in enumerate(step_of[1:longest]):
                    if k >= 0:
                        is_greedy = steps[k].greedy and greedy[b][place]
                        logp = steps[k].logp + logps[b][place]
                        steps[k] = StepLogp(logp, steps[k].tokens + 1, is_greedy)
                results.append(steps)
        if cut:
            print(
                f"log-probs: {cut} of {len(rows)} rows are longer than the policy's context of "
                f"{self.context} tokens and were cut"
            )
        return results
