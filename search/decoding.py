"""The engine under all sampling: rows that each go on from a beginning of their own, decoded together in one rectangular KV cache.

A beginning is read once, whatever the number of its samples; rows that have ended leave the cache, and waiting beginnings enter.
Where a step of a solution ends, the cache of what was read so far is kept, and whoever goes on from there need not read it again.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

MAX_ROWS = 256  # sequences decoded at once: on two cores more rows do not raise the rate
COMPACT_AT = 0.75  # ended rows leave, and waiting ones enter, when this share of the rows or fewer is still being written
ROOM = 64  # tokens that a cache has room for before it is moved
KEPT_BYTES = 2 << 30  # what the kept caches of steps may take; those longest out of use go first


@dataclass
class Row:
    """The `sample`-th row of a beginning: the ids it has got so far, EOS included, how many it may get, and how it ended."""

    beginning: int
    sample: int
    most: int
    ids: list[int] = field(default_factory=list)
    ended: str = ""  # "finished" by EOS, "step" at the end of a step, "cut" at `most`


class _RoomyLayer(DynamicLayer):
    """Keys and values with room for more: DynamicLayer moves everything at every token, which takes two fifths of all time on a
    CPU. `keys` and `values` are what is in use of the two buffers; whoever wants other rows makes a new cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.buffers = self.keys, self.values
        used = self.keys.size(2)
        columns = used + key_states.size(2)
        if columns > self.buffers[0].size(2):
            rows, heads, _, _ = key_states.shape
            roomy = [new.new_empty(rows, heads, columns + ROOM, new.size(3)) for new in (key_states, value_states)]
            for buffer, old in zip(roomy, (self.keys, self.values), strict=True):
                buffer[:, :, :used] = old
            self.buffers = tuple(roomy)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, used:columns] = new
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self.buffers)
        return self.keys, self.values


Layers = list[tuple[Tensor, Tensor]]  # keys and values of every layer, each (rows, heads, tokens, size of a head)


@dataclass
class _Batch:
    """Rows whose texts are in the cache, each at its right end: a row's are the last `lengths` (R,) of its columns. `logits` (R, V)
    say what comes next; `uniforms` (R, most tokens) are a row's random numbers, `used` (R,) how many of them."""

    cache: Cache
    lengths: Tensor
    logits: Tensor
    uniforms: Tensor
    used: Tensor
    rows: list[Row]

    def take(self, places: Tensor) -> "_Batch":
        """These rows, and no more columns than they need."""
        lengths = self.lengths[places]
        first = self.cache.get_seq_length() - int(lengths.max())
        layers = [(keys[places, :, first:], values[places, :, first:]) for keys, values in _layers(self.cache)]
        rows = [self.rows[place] for place in places.tolist()]
        return _Batch(_cache(layers), lengths, self.logits[places], self.uniforms[places], self.used[places], rows)

    def join(self, other: "_Batch") -> "_Batch":
        both = (self, other)
        layers = [
            (_stack([keys for keys, _ in of_layer]), _stack([values for _, values in of_layer]))
            for of_layer in zip(*(_layers(batch.cache) for batch in both), strict=True)
        ]
        tensors = [torch.cat([getattr(batch, name) for batch in both]) for name in ("lengths", "logits", "uniforms", "used")]
        return _Batch(_cache(layers), *tensors, self.rows + other.rows)


def _layers(cache: Cache) -> Layers:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _cache(layers: Layers) -> Cache:
    cache = Cache(layer_class_to_replicate=_RoomyLayer)  # all layers alike: those with a window keep everything as well
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """(R, H, T, D) tensors of several T under each other, aligned at the right end of T."""
    longest = max(tensor.size(2) for tensor in tensors)
    return torch.cat([pad(tensor, (0, 0, longest - tensor.size(2), 0)) for tensor in tensors])


class Decoder:
    """A causal language model with full attention (a window longer than the texts is as good), its tokenizer and end tokens."""

    def __init__(self, model, tokenizer, eos_ids: set[int]):
        self.model, self.tokenizer, self.eos_ids = model, tokenizer, eos_ids
        self.context = getattr(model.config, "max_position_embeddings", 2048)
        self._kept: OrderedDict[tuple[int, ...], Layers] = OrderedDict()  # ids -> cache of all of them but the last
        self._kept_bytes = 0
        self._newlines: dict[int, bool] = {}

    # --- where steps end

    def step_ends(self, ids: Sequence[int]) -> list[int]:
        """How many ids there are up to the end of each step. A token with a newline ends a step that holds more than white space;
        what follows the last newline is a step as well, if it holds anything, or else belongs to the step before."""
        ends, start = [], 0
        for position, token in enumerate(ids, 1):
            if (position == len(ids) or self._breaks(token)) and self.text(ids[start:position]):
                ends.append(position)
                start = position
        return [*ends[:-1], len(ids)] if ends else []

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())

    def _breaks(self, token: int) -> bool:
        if token not in self._newlines:
            self._newlines[token] = "\n" in self.tokenizer.decode([token])
        return self._newlines[token]

    # --- decoding

    @torch.inference_mode()
    def decode(
        self,
        beginnings: Sequence[Sequence[int]],
        n: int,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        one_step: bool = False,
        top_p: float = 1.0,
    ) -> Iterator[list[Row]]:
        """After every token the rows that got it. There are n rows a beginning, each written until EOS, `max_new_tokens`, the end
        of the model's context or, with `one_step`, the end of a step. Beginnings are ids, one at least, fewer than the context.
        top_p, above 0: only the likeliest tokens that together reach this probability are drawn.

        A row's random numbers come from seed, beginning and sample alone, so it does not matter what else is decoded."""
        waiting = sorted(range(len(beginnings)), key=lambda i: -len(beginnings[i]))  # like lengths enter together
        batch: _Batch | None = None
        while waiting or batch:
            free = MAX_ROWS - (len(batch.rows) if batch else 0)
            if waiting and (batch is None or free >= max(n, (1 - COMPACT_AT) * MAX_ROWS)):
                entering = [waiting.pop() for _ in range(min(len(waiting), max(1, free // n)))]
                for group in self._enter({i: tuple(beginnings[i]) for i in entering}, n, max_new_tokens, seed):
                    batch = batch.join(group) if batch else group
            tokens = self._choose(batch, temperature, top_p)
            written = []
            for place, (row, token) in enumerate(zip(batch.rows, tokens.tolist(), strict=True)):
                if row.ended:
                    continue
                row.ids.append(token)
                written.append(row)
                if token in self.eos_ids:
                    row.ended = "finished"
                elif one_step and self._breaks(token) and self.text(row.ids):
                    row.ended = "step"
                    self._keep((*beginnings[row.beginning], *row.ids), batch, place)
                elif len(row.ids) >= row.most:
                    row.ended = "cut"
            yield written
            alive = [place for place, row in enumerate(batch.rows) if not row.ended]
            if not alive:
                batch = None
                continue
            if len(alive) <= COMPACT_AT * len(batch.rows):
                places = torch.tensor(alive, device=tokens.device)
                batch, tokens = batch.take(places), tokens[places]
            batch.lengths = batch.lengths + 1
            batch.logits = self._read(batch.cache, batch.lengths, tokens[:, None])

    def _choose(self, batch: _Batch, temperature: float, top_p: float) -> Tensor:
        """The next token of every row, (R,): the likeliest at temperature 0, else the one at which the cumulative probability
        passes the row's next random number."""
        if temperature == 0:
            return batch.logits.argmax(-1)
        probabilities = (batch.logits / temperature).softmax(-1)
        if top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= top_p  # those before it are enough
            probabilities = probabilities.masked_fill(beyond.gather(-1, order.argsort(-1)), 0)
        cumulative = probabilities.cumsum(-1)
        last = batch.uniforms.size(1) - 1  # rows that have ended go on using their last number
        uniform = batch.uniforms.gather(1, batch.used.clamp(max=last)[:, None])
        batch.used = batch.used + 1
        tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
        return tokens.clamp(max=cumulative.size(1) - 1)

    def _read(self, cache: Cache, lengths: Tensor, ids: Tensor) -> Tensor:
        """Reads ids (R, M) into the cache; the logits (R, V) of what follows. `lengths` (R,): a row's tokens after that, which are
        the last columns of the cache. M is more than 1 only where the cache is empty, with padding on the left."""
        columns = cache.get_seq_length() + ids.size(1)
        places = torch.arange(columns, device=ids.device) - (columns - lengths)[:, None]  # (R, columns), below 0: padding
        positions = places[:, -ids.size(1) :].clamp(0, self.context - 1)  # rows that have ended may go past the context
        inputs = {"input_ids": ids, "attention_mask": (places >= 0).long(), "position_ids": positions}
        return self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()

    def _enter(self, beginnings: dict[int, tuple[int, ...]], n: int, max_new_tokens: int, seed: int) -> Iterator[_Batch]:
        """Batches of n rows a beginning: of those whose cache was kept, and of the others, which are read."""
        device = self.model.device
        kept = {i: self._kept[ids] for i, ids in beginnings.items() if ids in self._kept}
        for group in (list(kept), [i for i in beginnings if i not in kept]):
            if not group:
                continue
            lengths = torch.tensor([len(beginnings[i]) for i in group], device=device)
            if group[0] in kept:
                of_layers = zip(*(kept[i] for i in group), strict=True)
                cache = _cache([(_stack([k for k, _ in layer]), _stack([v for _, v in layer])) for layer in of_layers])
                ids = torch.tensor([beginnings[i][-1:] for i in group], device=device)
                for i in group:
                    self._kept.move_to_end(beginnings[i])
            else:
                cache, longest = _cache([]), int(lengths.max())
                ids = torch.tensor([[0] * (longest - len(beginnings[i])) + [*beginnings[i]] for i in group], device=device)
            logits = self._read(cache, lengths, ids)
            cache = _cache([(k.repeat_interleave(n, 0), v.repeat_interleave(n, 0)) for k, v in _layers(cache)]) if n > 1 else cache
            rows = [Row(i, k, min(max_new_tokens, self.context - len(beginnings[i]))) for i in group for k in range(n)]
            most = min(max_new_tokens, self.context)
            uniforms = torch.from_numpy(np.stack([_uniforms(seed, beginnings[row.beginning], row.sample, most) for row in rows]))
            repeated = lengths.repeat_interleave(n)
            yield _Batch(cache, repeated, logits.repeat_interleave(n, 0), uniforms.to(device), torch.zeros_like(repeated), rows)

    def _keep(self, ids: tuple[int, ...], batch: _Batch, place: int) -> None:
        """Keep the cache of a row for whoever goes on from its ids; the last of them is not read yet."""
        if ids in self._kept:
            return
        length = int(batch.lengths[place])
        layers = [(k[place, None, :, -length:].clone(), v[place, None, :, -length:].clone()) for k, v in _layers(batch.cache)]
        self._kept[ids] = layers
        self._kept_bytes += _bytes(layers)
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= _bytes(self._kept.popitem(last=False)[1])


def _bytes(layers: Layers) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in layers)


def _uniforms(seed: int, beginning: tuple[int, ...], sample: int, most: int) -> np.ndarray:
    """The random numbers of a row, (most,), in [0, 1)."""
    key = hashlib.blake2b(repr((seed, beginning, sample)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key))).random(most, dtype=np.float32)
