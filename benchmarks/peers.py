"""Peers of lm/policy.py for the benchmarks: the same methods, sampled by other engines."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteriaList

from lm.decoding import MAX_ROWS, DecodingRow
from lm.policy import Policy, State

WAYS = {
    "once": "a prefix is read once for all its samples",
    "dynamic": "num_return_sequences: a prefix is read for each sample, in one batch",
    "static": "the same with a static cache",
    "alone": "one call a sample; at most 4, since each costs the same",
}


class GeneratePolicy(Policy):
    """A policy that samples with transformers' `generate`, in one of WAYS.

    States are padded to one batch of at most as many rows as our decoder takes. No cache outlives a
    call, so a search reads every prefix again at every step. With `once` this is the best that
    `generate` offers on a CPU."""

    way = "once"

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
        torch.manual_seed(seed)
        if self.way == "alone":
            return [
                [self._generate([state], 1, temperature, max_new_tokens, one_step)[0][0]
                 for _ in range(min(n, 4))]
                for state in states
            ]  # fmt: skip
        order = sorted(range(len(states)), key=lambda k: len(states[k].ids))
        size = max(1, MAX_ROWS // n)
        sampled: dict[int, list[State]] = {}
        for start in range(0, len(order), size):
            places = order[start : start + size]
            group = [states[k] for k in places]
            made = self._generate(group, n, temperature, max_new_tokens, one_step)
            sampled |= dict(zip(places, made, strict=True))
        return [sampled[k] for k in range(len(states))]

    @torch.inference_mode()
    def _generate(
        self,
        states: Sequence[State],
        n: int,
        temperature: float,
        max_new_tokens: int,
        one_step: bool,
    ) -> list[list[State]]:
        longest = max(len(state.ids) for state in states)
        pad = min(self.decoder.eos_ids)
        left = [longest - len(state.ids) for state in states]
        ids = torch.tensor(
            [(pad,) * k + state.ids for k, state in zip(left, states, strict=True)]
        )  # (B, L)
        mask = (torch.arange(longest) >= torch.tensor(left)[:, None]).long()
        limit = min(max_new_tokens, self.context - longest)
        options: dict[str, Any] = {
            **{"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0},
            **{"max_new_tokens": limit, "pad_token_id": pad},
        }
        if one_step:
            options["stopping_criteria"] = StoppingCriteriaList([self._step_ended(longest)])
        if self.way == "once" and longest > 1:
            cache = DynamicCache(config=self.model.config)
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            self.model(
                ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=places[:, :-1],
                past_key_values=cache,
                logits_to_keep=1,
            )
            cache.batch_repeat_interleave(n)
            options["past_key_values"] = cache
            ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        else:
            options["num_return_sequences"] = n
            if self.way == "static":
                options["cache_implementation"] = "static"
        rows = self.model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()
        return [
            [self._cut(state, row, limit, one_step) for row in rows[k * n : (k + 1) * n]]
            for k, state in enumerate(states)
        ]

    def _step_ended(self, length: int) -> Any:
        """A stopping criterion: a row ends with a line break and is not blank from `length` on."""
        if not hasattr(self, "_breaks"):
            size = self.model.get_input_embeddings().weight.size(0)
            texts = self.tokenizer.batch_decode([[k] for k in range(size)])
            self._breaks = torch.tensor(["\n" in text for text in texts])
            self._blank = torch.tensor([not text.strip() for text in texts])

        def ended(ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
            return self._breaks[ids[:, -1]] & ~self._blank[ids[:, length:]].all(1)

        return ended

    def _cut(self, state: State, ids: list[int], limit: int, one_step: bool) -> State:
        """The state after a generated row, without the padding behind its end."""
        row = DecodingRow(0, [0], limit)
        for token in ids:
            row.ids.append(token)
            row.ended = self.decoder._ending(row, one_step)
            if row.ended:
                break
        row.ended = row.ended or "cut"
        return self._child(state, row)


class LlamaCppPolicy:
    """llama.cpp's server in this process: continuous batching and its cache of prompts.

    It has what the benchmarks use of a Policy. A state is its ids; those of sampled text are made
    by tokenizing it again. tokenizer: the policy's."""

    def __init__(self, path: str, tokenizer: Any, threads: int, rows: int, context: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.verbosity = path, 0
        # the rows share one cache, so that they share a prefix
        params.n_parallel, params.n_ctx, params.kv_unified = rows, rows * context, True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server, self.tokenizer = xllamacpp.Server(params), tokenizer

    def _sample(
        self, state: State, n: int, seed: int, max_new_tokens: int, one_step: bool
    ) -> list[State]:
        request = {
            **{"prompt": list(state.ids), "n": n, "n_predict": max_new_tokens, "seed": seed},
            **{"temperature": 1.0, "samplers": ["temperature"], "cache_prompt": True},
            **({"stop": ["\n"]} if one_step else {}),
        }
        children = []
        for choice in self.server.handle_completions(request)["choices"]:
            text = choice["text"] + "\n" * one_step
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            # "stop" is the line break or EOS, which follows an answer
            is_open = choice["finish_reason"] == "stop" and "Answer" not in text
            status = "open" if is_open else "finished"
            children.append(State(state.prompt, (*state.ids, *ids), (), (), status, len(ids)))
        return children

    def rollouts(
        self, states: Sequence[State], n: int, max_new_tokens: int, seed: int
    ) -> list[list[State]]:
        return [self._sample(state, n, seed, max_new_tokens, False) for state in states]

    def next_steps(
        self, states: Sequence[State], n: int, max_new_tokens: int, seed: int
    ) -> list[list[State]]:
        return [self._sample(state, n, seed, max_new_tokens, True) for state in states]
