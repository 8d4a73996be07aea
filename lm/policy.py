"""The policy: next steps, whole solutions and their log-probs, for many prefixes at once.

`Policy` runs a model here (lm/decoding.py is its engine); `ServerPolicy` (lm/server_policy.py) asks a
server and has the same methods.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from common.errors import PromptTooLong
from lm.decoding import Decoder, DecodingRow
from lm.loading import load_model, scoring_device
from lm.text_encoding import encode_prompt, encode_steps


@dataclass(frozen=True)
class State:
    """A beginning of a solution, or a whole one. Its ids are those that were sampled: they are never tokenized again.

    ids: the template with the prompt, then the steps, with EOS if it is finished. ends[k]: how many of them there are up to the end
    of step k, counted from 1; ends[0] is the prompt's. status: `open` may go on; `finished` ended by EOS; `cut` at a limit.
    sampled: tokens that were sampled to come here from the state that was asked."""

    prompt: str
    ids: tuple[int, ...]
    ends: tuple[int, ...]
    steps: tuple[str, ...] = ()
    status: str = "open"
    sampled: int = field(default=0, compare=False)

    def first(self, k: int) -> "State":
        """Its first k steps, open; all of them are itself."""
        if k == len(self.steps):
            return self
        ids = self.ids[: self.ends[k]] if self.ends else ()  # a server's states have text alone
        return State(self.prompt, ids, self.ends[: k + 1], self.steps[:k])


@dataclass(frozen=True)
class Response:
    """A sampled solution: its steps, whether it ended by itself (EOS), and how many tokens were sampled."""

    steps: list[str]
    finished: bool
    tokens: int


@dataclass(frozen=True)
class StepLogp:
    """A step under a policy: the sum of its tokens' log-probs in nats, how many they are, and whether each is the greedy choice."""

    logp: float
    tokens: int
    greedy: bool


class Policy:
    """A causal language model and its tokenizer.

    Raises ModelError if nothing can be loaded, PromptTooLong if a prompt leaves no room in the model's context."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.device = model.device
        eos = model.generation_config.eos_token_id
        eos_ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
        self.decoder = Decoder(model, tokenizer, eos_ids)
        self.context = self.decoder.context

    @classmethod
    def load(cls, model_name_or_path: str) -> "Policy":
        """Any causal LM or adapter, a directory or a hub name; in float32 on a CPU, as it is stored on a GPU."""
        device, dtype = scoring_device()
        model, tokenizer = load_model(model_name_or_path, dtype)
        return cls(model.to(device), tokenizer)

    def start(self, prompt: str, steps: Sequence[str] = ()) -> State:
        """The state from which a prompt is answered, or its solution goes on after these steps. Raises PromptTooLong."""
        ids, step_of = (
            encode_steps(self.tokenizer, prompt, [], list(steps))
            if steps
            else (encode_prompt(self.tokenizer, prompt), [])
        )
        self._check_length(prompt, ids)
        finished = bool(steps) and ids[-1] == self.tokenizer.eos_token_id
        ends = [step_of.index(k) for k in range(len(steps))] + [len(ids)]
        return State(
            prompt, tuple(ids), tuple(ends), tuple(steps), "finished" if finished else "open"
        )

    def next_steps(
        self,
        states: Sequence[State],
        n: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 64,
        seed: int = 0,
        progress: str | None = None,
    ) -> list[list[State]]:
        """n states for every open state, each one step longer (none, if all that came was EOS or blanks). What was read and
        written so far is kept, so that going on from one of them costs no reading.

        Temperature 0 is greedy. The samples of a state come from the seed, the state and their number: alone or among others,
        a state has the same, and the same state given twice has the same twice."""
        return self._go_on(states, n, temperature, max_new_tokens, seed, progress, one_step=True)

    def rollouts(
        self,
        states: Sequence[State],
        n: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        seed: int = 0,
        progress: str | None = None,
    ) -> list[list[State]]:
        """n whole solutions that begin with each open state, `max_new_tokens` longer at most; sampled as in `next_steps`."""
        return self._go_on(states, n, temperature, max_new_tokens, seed, progress, one_step=False)

    def _go_on(
        self, states, n, temperature, max_new_tokens, seed, progress, one_step
    ) -> list[list[State]]:
        if closed := [state for state in states if state.status != "open"]:
            raise ValueError(
                f"a state that is {closed[0].status} cannot go on: {closed[0].steps[-1:]}"
            )
        children: list[list[State | None]] = [[None] * n for _ in states]
        with tqdm(
            total=len(states) * n, desc=progress, unit="sample", disable=progress is None
        ) as bar:
            beginnings = [state.ids for state in states]
            for rows in self.decoder.decode(
                beginnings, n, temperature, max_new_tokens, seed, one_step
            ):
                ended = [row for row in rows if row.ended]
                for row in ended:
                    child = self._child(states[row.prefix], row)
                    for sample in row.samples:
                        children[row.prefix][sample] = child
                bar.update(sum(len(row.samples) for row in ended))
        return children

    def _child(self, state: State, row: DecodingRow) -> State:
        begin = len(state.ids)
        ends = self.decoder.step_ends(row.ids)
        steps = [self.decoder.text(row.ids[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        ids = (*state.ids, *row.ids)
        all_ends = (
            (*state.ends, *(begin + end for end in ends)) if ends else (*state.ends[:-1], len(ids))
        )
        status = {"step": "open" if len(ids) < self.context else "cut"}.get(row.ended, row.ended)
        return State(state.prompt, ids, all_ends, (*state.steps, *steps), status, len(row.ids))

    def generate(
        self,
        prompts: Sequence[str],
        n: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 256,
        seed: int = 0,
        progress: str | None = None,
    ) -> list[list[Response]]:
        """n responses to every prompt. Temperature 0 is greedy. The same arguments give the same responses on the same machine."""
        states = [self.start(prompt) for prompt in prompts]
        return [
            [
                Response(list(whole.steps), whole.status == "finished", whole.sampled)
                for whole in wholes
            ]
            for wholes in self.rollouts(states, n, temperature, max_new_tokens, seed, progress)
        ]

    def texts(
        self,
        prompts: Sequence[str],
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int = 256,
        seed: int = 0,
        chat: bool = False,
    ) -> list[tuple[str, bool]]:
        """One text for every prompt, line breaks and all, and whether it ended by itself (EOS). The same prompt and arguments give
        the same text, whatever else is asked.

        chat: the prompt is the user's message as it is, without the instruction to solve it step by step; the model has a chat
        template. Raises PromptTooLong."""
        beginnings = [encode_prompt(self.tokenizer, prompt, chat) for prompt in prompts]
        for prompt, ids in zip(prompts, beginnings, strict=True):
            self._check_length(prompt, ids)
        texts = [("", False)] * len(prompts)
        for rows in self.decoder.decode(
            beginnings, 1, temperature, max_new_tokens, seed, top_p=top_p
        ):
            for row in rows:
                if row.ended:
                    text = self.tokenizer.decode(row.ids, skip_special_tokens=True).strip()
                    texts[row.prefix] = (text, row.ended == "finished")
        return texts

    def stream(
        self, prompt: str, temperature: float = 0.0, max_new_tokens: int = 256, seed: int = 0
    ) -> Iterator[str]:
        """The text of one response, piece by piece as it is written."""
        text, ids = "", []
        for (row,) in self.decoder.decode(
            [self.start(prompt).ids], 1, temperature, max_new_tokens, seed
        ):
            ids = row.ids[:-1] if row.ended == "finished" else row.ids
            longer = self.tokenizer.decode(ids, skip_special_tokens=True)
            if not longer.endswith("\ufffd"):  # half of a character: wait for the rest
                yield longer[len(text) :]
                text = longer
        yield self.tokenizer.decode(ids, skip_special_tokens=True)[len(text) :]

    def _check_length(self, prompt: str, ids: Sequence[int]) -> None:
        if len(ids) >= self.context:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens, the policy's context holds {self.context}: {prompt[:60]!r} ..."
            )

    def logps(
        self, rows: Sequence[tuple[str, list[str], list[str]]], progress: str | None = None
    ) -> list[float]:
        """Mean token log-prob of the steps of (prompt, prefix, steps), given prompt and prefix. Rows longer than the context are
        cut at its end, and how many is said."""
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
        """One StepLogp for every step of (prompt, prefix, steps), each given all that stands before it. Rows longer than the
        context are cut at its end, and how many is said; a step of which nothing is left has no tokens."""
        results, cut = [], 0
        for start in tqdm(
            range(0, len(rows), batch_size), desc=progress, unit="batch", disable=progress is None
        ):
            batch = rows[start : start + batch_size]
            encoded = [encode_steps(self.tokenizer, *row) for row in batch]
            longest = min(self.context, max(len(ids) for ids, _ in encoded))
            # right-padded: later tokens never reach earlier ones
            ids = torch.zeros(len(encoded), longest, dtype=torch.long)
            for b, (row_ids, _) in enumerate(encoded):
                cut += len(row_ids) > longest
                ids[b, : len(row_ids)] = torch.tensor(row_ids[:longest])
            ids = ids.to(self.device)
            logits = self.model(input_ids=ids).logits[:, :-1].float()  # (B, T-1, V)
            greedy = (logits.argmax(-1) == ids[:, 1:]).tolist()
            logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].tolist()
            for b, (_, step_of) in enumerate(encoded):
                places: list[list[int]] = [[] for _ in batch[b][2]]
                for place, step in enumerate(step_of[1:longest]):
                    if step >= 0:
                        places[step].append(place)
                results.append(
                    [
                        StepLogp(
                            sum(logps[b][i] for i in step),
                            len(step),
                            all(greedy[b][i] for i in step),
                        )
                        for step in places
                    ]
                )
        if cut:
            print(
                f"log-probs: {cut} of {len(rows)} rows are longer than the policy's context of {self.context} tokens and were cut"
            )
        return results
