"""The policy: all sampling of the project, batched over prompts with a KV cache, and the log-probs of given solutions."""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import find_adapter_config_file

from reasoning.records import RecordError
from reasoning.steps import encode_steps, format_prompt, split_steps
from reward_model.base import PromptTooLong

MAX_ROWS = 256  # sequences decoded at once: on two cores more rows do not raise the rate
COMPACT_AT = 0.75  # the cache is compacted when this share of its rows or fewer is still being written


def pick_device() -> tuple[str, bool]:
    """(device, bf16): what this machine has. On a CPU bf16 is 1.5 times faster with its own instructions and 3.5 times slower
    without them, so it is used only where they are."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return "cpu", bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def base_of(model_name_or_path: str, revision: str | None = None) -> tuple[str, bool]:
    """(what holds the weights, True) for a PEFT adapter: the base it names; (the same name, False) for any other model."""
    adapter = find_adapter_config_file(model_name_or_path, revision=revision)
    if adapter is None:
        return model_name_or_path, False
    base = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError("its adapter_config.json names no base_model_name_or_path")
    return base, True


def load_model(
    model_name_or_path: str,
    dtype: torch.dtype | str,
    trainable: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
):
    """(model, tokenizer) of a directory or a hub name: a causal LM, or a PEFT adapter (LoRA and its kin) on its base.

    An adapter is a PeftModel and stays beside its base: small updates would be lost in the rounding if they were added to weights
    of 16 bits (`model.merge_and_unload()` does it, best in float32). A tokenizer that the adapter lacks is its base's.
    trainable: the adapter is loaded to be trained. revision: of what is named, not of an adapter's base.
    Raises RecordError if nothing can be loaded, or not all of it."""
    name = base = model_name_or_path
    try:
        base, is_adapter = base_of(name, revision)
        hub = {"revision": None if is_adapter else revision, "trust_remote_code": trust_remote_code}
        model, loading = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, use_safetensors=True, output_loading_info=True, **hub
        )
        if loading["missing_keys"]:  # transformers fills them with random numbers
            raise ValueError(f"weights are missing, {min(loading['missing_keys'])} for one")
        if not is_adapter:
            return model, AutoTokenizer.from_pretrained(name, **hub)
        return _add_adapter(model, name, trainable, revision), _tokenizer_of_adapter(name, base, revision)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        place = "it" if base == name else f"it and its base {base}"
        reason = str(error).strip().replace(":\n", ": ").splitlines()[0]
        raise RecordError(f"{name}: no model can be loaded from {place} ({reason})") from None


def _add_adapter(model, name: str, trainable: bool, revision: str | None):
    from peft import PeftModel

    if Path(name).is_dir() and not (Path(name) / "adapter_model.safetensors").is_file():
        raise ValueError("adapter_model.safetensors is missing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("error", message="Found missing adapter keys")  # peft would start them anew
        try:
            model = PeftModel.from_pretrained(model, name, is_trainable=trainable, revision=revision)
        except UserWarning as warning:
            raise ValueError(str(warning)) from None
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(f"its adapter is of the type {model.active_peft_config.peft_type.value}, expected LoRA or its kin")
    return model


def _tokenizer_of_adapter(name: str, base: str, revision: str | None):
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError):
        return AutoTokenizer.from_pretrained(base)


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

    Raises RecordError if nothing can be loaded, PromptTooLong if a prompt leaves no room in the model's context."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.device = model.device
        self.context = getattr(model.config, "max_position_embeddings", 2048)
        eos = model.generation_config.eos_token_id
        self.eos_ids = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}

    @classmethod
    def load(cls, model_name_or_path: str) -> "Policy":
        """Any causal LM or adapter, a directory or a hub name; in float32 on a CPU, as it is stored on a GPU."""
        device, _ = pick_device()
        model, tokenizer = load_model(model_name_or_path, torch.float32 if device == "cpu" else "auto")
        return cls(model.to(device), tokenizer)

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
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))  # prompts of like length share a batch
        responses: list[list[Response]] = [[] for _ in prompts]
        per_batch = max(1, MAX_ROWS // n)
        with tqdm(total=len(prompts) * n, desc=progress, unit="answer", disable=progress is None) as bar:
            for start in range(0, len(order), per_batch):
                batch = order[start : start + per_batch]
                generator = torch.Generator(self.device).manual_seed(seed * 1_000_003 + start)
                written: list[list[int]] = [[] for _ in range(len(batch) * n)]
                for rows, tokens in self._decode([ids[i] for i in batch], n, temperature, max_new_tokens, generator):
                    for row, token in zip(rows, tokens, strict=True):
                        written[row].append(token)
                for position, i in enumerate(batch):
                    responses[i] = [self._response(written[position * n + k]) for k in range(n)]
                bar.update(len(written))
        return responses

    def stream(self, prompt: str, temperature: float = 0.0, max_new_tokens: int = 256, seed: int = 0) -> Iterator[str]:
        """The text of one response, piece by piece as it is written."""
        generator = torch.Generator(self.device).manual_seed(seed)
        ids, text = [], ""
        for _, tokens in self._decode([self._prompt_ids(prompt)], 1, temperature, max_new_tokens, generator):
            ids += [token for token in tokens if token not in self.eos_ids]
            longer = self.tokenizer.decode(ids, skip_special_tokens=True)
            if not longer.endswith("�"):  # half of a character: wait for the rest
                yield longer[len(text) :]
                text = longer
        yield self.tokenizer.decode(ids, skip_special_tokens=True)[len(text) :]

    def _prompt_ids(self, prompt: str) -> list[int]:
        text = format_prompt(prompt, self.tokenizer)
        ids = self.tokenizer(text, add_special_tokens=not self.tokenizer.chat_template, verbose=False)["input_ids"]
        if len(ids) >= self.context:
            raise PromptTooLong(f"the prompt has {len(ids)} tokens, the policy's context holds {self.context}: {prompt[:60]!r} ...")
        return ids

    def _response(self, ids: list[int]) -> Response:
        finished = bool(ids) and ids[-1] in self.eos_ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Response(split_steps(text), finished, len(ids))

    @torch.inference_mode()
    def _decode(
        self, prompts: list[list[int]], n: int, temperature: float, max_new_tokens: int, generator: torch.Generator
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yields (rows, tokens), one token for every row that is still being written, EOS included. Row i*n + k is the k-th
        response to prompt i. The prompts are read once and their cache is repeated n times."""
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.device)  # (B, T), left-padded
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        logits = output.logits[:, -1].float().repeat_interleave(n, 0)  # (B * n, V)
        cache.batch_repeat_interleave(n)
        mask, position = mask.repeat_interleave(n, 0), positions[:, -1:].repeat_interleave(n, 0)
        rows = torch.arange(len(prompts) * n, device=self.device)  # which response each row of the cache writes
        alive = torch.ones_like(rows, dtype=torch.bool)
        eos = torch.tensor(sorted(i for i in self.eos_ids if i is not None), device=self.device)
        for _ in range(min(max_new_tokens, self.context - longest)):
            if temperature > 0:
                tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            else:
                tokens = logits.argmax(-1)
            yield rows[alive].tolist(), tokens[alive].tolist()
            alive = alive & ~torch.isin(tokens, eos)
            if not alive.any():
                return
            if alive.float().mean() <= COMPACT_AT:
                keep = alive.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                mask, position, rows, tokens, alive = mask[keep], position[keep], rows[keep], tokens[keep], alive[keep]
            position, mask = position + 1, torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            output = self.model(input_ids=tokens[:, None], attention_mask=mask, position_ids=position, past_key_values=cache)
            logits = output.logits[:, -1].float()

    def logps(self, rows: Sequence[tuple[str, list[str], list[str]]], progress: str | None = None) -> list[float]:
        """Mean token log-prob of the steps of (prompt, prefix, steps), given prompt and prefix. Rows longer than the context are
        cut at its end, and how many is said."""
        return [
            sum(step.logp for step in steps) / max(1, sum(step.tokens for step in steps))
            for steps in self.step_logps(rows, progress)
        ]

    @torch.inference_mode()
    def step_logps(
        self, rows: Sequence[tuple[str, list[str], list[str]]], progress: str | None = None, batch_size: int = 32
    ) -> list[list[StepLogp]]:
        """One StepLogp for every step of (prompt, prefix, steps), each given all that stands before it. Rows longer than the
        context are cut at its end, and how many is said; a step of which nothing is left has no tokens."""
        results, cut = [], 0
        for start in tqdm(range(0, len(rows), batch_size), desc=progress, unit="batch", disable=progress is None):
            batch = rows[start : start + batch_size]
            encoded = [encode_steps(self.tokenizer, *row) for row in batch]
            longest = min(self.context, max(len(ids) for ids, _ in encoded))
            ids = torch.zeros(len(encoded), longest, dtype=torch.long)  # right-padded: later tokens never reach earlier ones
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
                    [StepLogp(sum(logps[b][i] for i in step), len(step), all(greedy[b][i] for i in step)) for step in places]
                )
        if cut:
            print(
                f"log-probs: {cut} of {len(rows)} rows are longer than the policy's context of {self.context} tokens and were cut"
            )
        return results
