"""The engine under all sampling: rows that each go on from a beginning of their own, decoded together in one rectangular KV cache.

A beginning is read once, and its samples are one row for as long as they draw the same tokens; where they part, the row splits:
what samples have in common is never computed twice. Rows that have ended leave the cache, and waiting ones enter. Where a step of
a solution ends, the cache of what was read so far is kept, and whoever goes on from there need not read it again.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

MAX_ROWS = 256  # sequences decoded at once: on two cores more rows do not raise the rate
COMPACT_AT = 0.75  # ended rows leave, and waiting ones enter, when this share of the rows or fewer is still being written
ROOM = 64  # tokens that a cache has room for before it is moved
KEPT_BYTES = 2 << 30  # what the kept caches of steps may take; those longest out of use go first


@dataclass
class DecodingRow:
    """Samples of a beginning that drew the same tokens so far: their numbers, the ids they have got, EOS included, how many they
    may get, how they ended. `uniforms` (n, most): the random numbers of all samples of the beginning, one a token."""

    prefix: int
    samples: list[int]
    most: int
    uniforms: np.ndarray | None = None
    ids: list[int] = field(default_factory=list)
    ended: str = ""  # "finished" by EOS, "step" at the end of a step, "cut" at `most`

    def add(self, tokens: Sequence[int]) -> list["DecodingRow"]:
        """Every sample gets its next token. Returns a row for each of the tokens that differ, this one among them."""
        parts: dict[int, list[int]] = {}
        # there may be more tokens: rows are padded
        for sample, token in zip(self.samples, tokens, strict=False):
            parts.setdefault(token, []).append(sample)
        (token, self.samples), *others = parts.items()
        split = [
            replace(self, samples=samples, ids=[*self.ids, other]) for other, samples in others
        ]
        self.ids.append(token)
        return [self, *split]


class _RoomyLayer(DynamicLayer):
    """Keys and values with room for more tokens and rows: DynamicLayer moves everything at every token, which takes two fifths of
    all time on a CPU. `keys` and `values` are what is in use of the two buffers."""

    def hold(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take over keys and values, (R, H, T, D) each, under each other, aligned at the right end of T."""
        if not self.is_initialized:
            self.lazy_initialization(*parts[0])
        rows, columns = (
            sum(keys.size(0) for keys, _ in parts),
            max(keys.size(2) for keys, _ in parts),
        )
        self.buffers = []
        for tensors in zip(*parts, strict=True):
            _, heads, _, size = tensors[0].shape
            buffer, end = (
                tensors[0].new_empty(
                    min(2 * rows, max(rows, MAX_ROWS)), heads, columns + ROOM, size
                ),
                0,
            )
            for tensor in tensors:
                start, end = end, end + tensor.size(0)
                left = columns - tensor.size(2)
                buffer[start:end, :, :left] = 0
                buffer[start:end, :, left:columns] = tensor
            self.buffers.append(buffer)
        self._use(rows, columns)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.hold([(key_states, value_states)])
            return self.keys, self.values
        used = self.keys.size(2)
        columns = used + key_states.size(2)
        if columns > self.buffers[0].size(2):
            self.hold([(self.keys, self.values)])
        rows = key_states.size(0)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, used:columns] = states
        self._use(rows, columns)
        return self.keys, self.values

    def _use(self, rows: int, columns: int) -> None:
        self.keys, self.values = (buffer[:rows, :, :columns] for buffer in self.buffers)

    def copy_rows(self, sources: Tensor, targets: Tensor, rows: int) -> None:
        """Write the rows `sources` over the rows `targets`, or behind all of them; `rows` there are afterwards."""
        columns = self.keys.size(2)
        for buffer in self.buffers:
            buffer[targets, :, :columns] = buffer[sources, :, :columns]
        self._use(rows, columns)


# keys and values of every layer, each (rows, heads, tokens, size of a head)
Layers = list[tuple[Tensor, Tensor]]


@dataclass
class _Batch:
    """Rows whose texts are in the cache, each at its right end: a row's are the last `lengths` (R,) of its columns. `logits` (R, V)
    say what comes next."""

    cache: Cache
    lengths: Tensor
    logits: Tensor
    rows: list[DecodingRow]

    def go_on(self, going: Sequence[tuple[int, DecodingRow]]) -> None:
        """What is left are these rows, each with the place that it had or split from."""
        stay = dict(reversed(going))  # the first of a place
        split = [(place, row) for place, row in going if stay[place] is not row]
        room = self.cache.layers[0].buffers[0].size(0)
        free = [place for place in range(room) if place not in stay]
        if len(going) <= COMPACT_AT * len(self.rows) or len(split) > len(free):
            places = torch.tensor([place for place, _ in going], device=self.lengths.device)
            self.lengths, self.rows = self.lengths[places], [row for _, row in going]
            first = self.cache.get_seq_length() - int(self.lengths.max())
            self.cache = _cache(
                [
                    [
                        (keys[places, :, first:], values[places, :, first:])
                        for keys, values in _layers(self.cache)
                    ]
                ]
            )
            return
        for place, row in stay.items():
            self.rows[place] = row
        if split:
            origin = [*range(len(self.rows))]
            for (source, row), target in zip(split, free, strict=False):
                if target == len(self.rows):
                    self.rows.append(row)
                    origin.append(source)
                else:
                    self.rows[target], origin[target] = row, source
            self.lengths = self.lengths[origin]
            sources, targets = (
                torch.tensor(places, device=self.lengths.device)
                for places in ([place for place, _ in split], free[: len(split)])
            )
            for layer in self.cache.layers:
                layer.copy_rows(sources, targets, len(origin))

    def join(self, other: "_Batch") -> "_Batch":
        both = (self, other)
        tensors = [
            torch.cat([getattr(batch, name) for batch in both]) for name in ("lengths", "logits")
        ]
        return _Batch(
            _cache([_layers(batch.cache) for batch in both]), *tensors, self.rows + other.rows
        )


def _layers(cache: Cache) -> Layers:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _cache(parts: Sequence[Layers]) -> Cache:
    """The rows of all parts under each other, as a cache to go on from."""
    # all layers alike: those with a window keep everything as well
    cache = Cache(layer_class_to_replicate=_RoomyLayer)
    for of_layer in zip(*parts, strict=True):
        cache.layers.append(_RoomyLayer())
        cache.layers[-1].hold(of_layer)
    return cache


class Decoder:
    """A causal language model with full attention (a window longer than the texts is as good), its tokenizer and end tokens."""

    def __init__(self, model, tokenizer, eos_ids: set[int]):
        self.model, self.tokenizer, self.eos_ids = model, tokenizer, eos_ids
        self.context = getattr(model.config, "max_position_embeddings", 2048)
        # ids -> cache of all of them but the last
        self._kept: OrderedDict[tuple[int, ...], Layers] = OrderedDict()
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
        prefixes: Sequence[Sequence[int]],
        n: int,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        one_step: bool = False,
        top_p: float = 1.0,
    ) -> Iterator[list[DecodingRow]]:
        """After every token the rows that got it. A beginning has n samples, in as many rows as differ, each written until EOS,
        `max_new_tokens`, the end of the model's context or, with `one_step`, the end of a step. Beginnings are ids, one at least,
        fewer than the context.
        top_p, above 0: only the likeliest tokens that together reach this probability are drawn.

        A sample's random numbers come from seed, beginning and number alone, so it does not matter what else is decoded."""
        waiting = [
            DecodingRow(i, [*range(n)], min(max_new_tokens, self.context - len(ids)))
            for i, ids in enumerate(prefixes)
        ]
        waiting.sort(key=lambda row: -len(prefixes[row.prefix]))  # like lengths enter together
        batch: _Batch | None = None
        while waiting or batch:
            free = MAX_ROWS - (len(batch.rows) if batch else 0)
            if waiting and (batch is None or free >= (1 - COMPACT_AT) * MAX_ROWS):
                entering = [waiting.pop() for _ in range(min(len(waiting), free))]
                for row in entering:
                    if temperature and row.uniforms is None:
                        ids = tuple(prefixes[row.prefix])
                        row.uniforms = np.array(
                            [_uniforms(seed, ids, sample, row.most) for sample in row.samples]
                        )
                for group in self._enter(
                    [((*prefixes[row.prefix], *row.ids), row) for row in entering]
                ):
                    batch = batch.join(group) if batch else group
            written, going = [], []
            for place, (row, tokens) in enumerate(
                zip(batch.rows, self._choose(batch, temperature, top_p), strict=True)
            ):
                for part in row.add(tokens) if not row.ended else ():
                    written.append(part)
                    if part.ids[-1] in self.eos_ids:
                        part.ended = "finished"
                    elif one_step and self._breaks(part.ids[-1]) and self.text(part.ids):
                        part.ended = "step"
                        self._keep((*prefixes[part.prefix], *part.ids), batch, place)
                    elif len(part.ids) >= part.most:
                        part.ended = "cut"
                    elif len(going) < MAX_ROWS:
                        going.append((place, part))
                    else:  # too many have split: it waits for room
                        self._keep((*prefixes[part.prefix], *part.ids), batch, place)
                        waiting.append(part)
            yield written
            if not going:
                batch = None
                continue
            batch.go_on(going)
            batch.lengths = batch.lengths + 1
            ids = torch.tensor([row.ids[-1:] for row in batch.rows], device=batch.lengths.device)
            batch.logits = self._read(batch.cache, batch.lengths, ids)

    def _choose(self, batch: _Batch, temperature: float, top_p: float) -> list[list[int]]:
        """The next token of every row's samples: the likeliest at temperature 0, else the one at which the cumulative probability
        passes the sample's next random number. Rows with fewer samples than others have tokens too many."""
        most = max(len(row.samples) for row in batch.rows)
        if temperature == 0:
            return batch.logits.argmax(-1, keepdim=True).expand(-1, most).tolist()
        probabilities = (batch.logits / temperature).softmax(-1)
        if top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= top_p  # those before it are enough
            probabilities = probabilities.masked_fill(beyond.gather(-1, order.argsort(-1)), 0)
        cumulative = probabilities.cumsum(-1)
        uniforms = np.zeros((len(batch.rows), most), dtype=np.float32)
        for place, row in enumerate(batch.rows):
            if not row.ended:
                uniforms[place, : len(row.samples)] = row.uniforms[row.samples, len(row.ids)]
        thresholds = torch.from_numpy(uniforms).to(cumulative.device) * cumulative[:, -1:]
        return (
            torch.searchsorted(cumulative, thresholds, right=True)
            .clamp(max=cumulative.size(1) - 1)
            .tolist()
        )

    def _read(self, cache: Cache, lengths: Tensor, ids: Tensor) -> Tensor:
        """Reads ids (R, M) into the cache; the logits (R, V) of what follows. `lengths` (R,): a row's tokens after that, which are
        the last columns of the cache. M is more than 1 only where the cache is empty, with padding on the left."""
        columns = cache.get_seq_length() + ids.size(1)
        # (R, columns), below 0: padding
        places = torch.arange(columns, device=ids.device) - (columns - lengths)[:, None]
        # rows that have ended may go past the context
        positions = places[:, -ids.size(1) :].clamp(0, self.context - 1)
        inputs = {
            "input_ids": ids,
            "attention_mask": (places >= 0).long(),
            "position_ids": positions,
        }
        return (
            self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            .logits[:, -1]
            .float()
        )

    def _enter(self, entering: Sequence[tuple[tuple[int, ...], DecodingRow]]) -> Iterator[_Batch]:
        """Batches of rows, each given with its ids from the first on: of those whose cache was kept, and of the others, which are
        read."""
        kept = [(ids, row) for ids, row in entering if ids in self._kept]
        for group in (kept, [(ids, row) for ids, row in entering if ids not in self._kept]):
            if not group:
                continue
            lengths = torch.tensor([len(ids) for ids, _ in group], device=self.model.device)
            if group is kept:
                cache = _cache([self._kept[ids] for ids, _ in group])
                unread = [ids[-1:] for ids, _ in group]
                for ids, row in group:
                    if row.ids:  # it waited for room: nobody else goes on from within a step
                        self._kept_bytes -= _bytes(self._kept.pop(ids))
                    else:
                        self._kept.move_to_end(ids)
            else:
                cache, longest = _cache([]), int(lengths.max())
                unread = [(0,) * (longest - len(ids)) + ids for ids, _ in group]
            logits = self._read(cache, lengths, torch.tensor(unread, device=self.model.device))
            yield _Batch(cache, lengths, logits, [row for _, row in group])

    def _keep(self, ids: tuple[int, ...], batch: _Batch, place: int) -> None:
        """Keep the cache of a row for whoever goes on from its ids; the last of them is not read yet."""
        if ids in self._kept:
            return
        length = int(batch.lengths[place])
        layers = [
            (k[place, None, :, -length:].clone(), v[place, None, :, -length:].clone())
            for k, v in _layers(batch.cache)
        ]
        self._kept[ids] = layers
        self._kept_bytes += _bytes(layers)
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= _bytes(self._kept.popitem(last=False)[1])


def _bytes(layers: Layers) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in layers)


def _uniforms(seed: int, prefix: tuple[int, ...], sample: int, most: int) -> np.ndarray:
    """The random numbers of a row, (most,), in [0, 1)."""
    key = hashlib.blake2b(repr((seed, prefix, sample)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key))).random(
        most, dtype=np.float32
    )
