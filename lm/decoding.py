"""The engine of all sampling: rows that each continue a prefix, decoded together in one KV cache.

A prefix is read once; the start that all new prefixes share, such as that of a chat template, is
read once for all of them. The samples of a prefix share one row while they draw the same tokens;
where they differ, the row is split, so no shared token is computed twice. Rows that have ended
leave the cache, and waiting rows enter. Where a step of a solution ends, the cache of the row is
kept: a later call that continues from there need not read the text again.
"""

import hashlib
import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lm.prompting import FIELD, USUAL, Style
from lm.text_encoding import format_prompt
from lm.thinking import answer_start, open_thought
from lm.tree_attention import shared_head

MAX_ROWS = 256  # rows decoded at once: on two cores more rows do not raise the rate
# ended rows leave and waiting ones enter when at most this share of the rows is still being written
COMPACT_AT = 0.75
SPARE_COLUMNS = 64  # tokens that a cache can take before it is moved to larger buffers
KEPT_BYTES = 2 << 30  # limit of the kept caches of steps; the least recently used are dropped first


@dataclass
class DecodingRow:
    """Samples of one prefix that have drawn the same tokens so far.

    prefix: the index of the prefix. samples: the numbers of the samples. limit: the most tokens
    that they may draw. uniforms (n, limit): random numbers for all samples of the prefix, one a
    token. solution, steps: the ids of the solution in the prefix, and the number of its steps. ids:
    the tokens drawn so far, EOS included. ended: empty while the row is being written, then
    "finished" (by EOS), "step" (at the end of a step) or "cut" (at `limit`)."""

    prefix: int
    samples: list[int]
    limit: int
    uniforms: Any = None
    solution: Sequence[int] = ()
    steps: int = 0
    ids: list[int] = field(default_factory=list)
    ended: str = ""

    def add(self, tokens: Sequence[int]) -> list["DecodingRow"]:
        """Append the next token of every sample. Returns a row for each token, this one first."""
        parts: dict[int, list[int]] = {}
        # `tokens` may be longer than the samples: it is padded to the row with the most samples
        for sample, token in zip(self.samples, tokens, strict=False):
            parts.setdefault(token, []).append(sample)
        (token, self.samples), *others = parts.items()
        split = [replace(self, samples=part, ids=[*self.ids, other]) for other, part in others]
        self.ids.append(token)
        return [self, *split]


# keys and values of every layer, each (R, H, T, D): rows, heads, tokens, size of a head
Layers = list[tuple[Tensor, Tensor]]


class _BufferedLayer(DynamicLayer):
    """Two buffers with spare rows and columns; `keys` and `values` are their parts in use.

    (DynamicLayer copies everything at every token: two fifths of all time on a CPU.)"""

    def hold(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy (keys, values), each (R, H, T, D), below one another, aligned at T's right end."""
        if not self.is_initialized:
            self.lazy_initialization(*parts[0])
        rows = sum(keys.size(0) for keys, _ in parts)
        columns = max(keys.size(2) for keys, _ in parts)
        capacity = min(2 * rows, max(rows, MAX_ROWS)), columns + SPARE_COLUMNS
        self.buffers = []
        for tensors in zip(*parts, strict=True):
            _, heads, _, size = tensors[0].shape
            buffer = tensors[0].new_empty(capacity[0], heads, capacity[1], size)
            end = 0
            for tensor in tensors:
                start, end = end, end + tensor.size(0)
                left = columns - tensor.size(2)
                buffer[start:end, :, :left] = 0
                buffer[start:end, :, left:columns] = tensor
            self.buffers.append(buffer)
        self._use(rows, columns)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
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
        """Copy the rows `sources` to the places `targets`. The first `rows` are then in use."""
        columns = self.keys.size(2)
        for buffer in self.buffers:
            buffer[targets, :, :columns] = buffer[sources, :, :columns]
        self._use(rows, columns)


@dataclass
class _Batch:
    """Rows in one cache.

    The tokens of a row are the last `lengths` (R,) of its columns; `logits` (R, V) predict its next
    token."""

    cache: Cache
    lengths: Tensor
    logits: Tensor
    rows: list[DecodingRow]

    def keep(self, kept: Sequence[tuple[int, DecodingRow]]) -> None:
        """Keep these rows, each given with its place or that of the row from which it was split.

        The places of other rows are reused, or removed if few rows are left."""
        stay = dict(reversed(kept))  # place -> the first of its rows
        split = [(place, row) for place, row in kept if stay[place] is not row]
        capacity = self.cache.layers[0].buffers[0].size(0)
        free = [place for place in range(capacity) if place not in stay]
        if len(kept) <= COMPACT_AT * len(self.rows) or len(split) > len(free):
            self._compact(kept)
            return
        for place, row in stay.items():
            self.rows[place] = row
        if not split:
            return
        targets = free[: len(split)]
        origin = [*range(len(self.rows))]
        for (source, row), target in zip(split, targets, strict=True):
            if target == len(self.rows):
                self.rows.append(row)
                origin.append(source)
            else:
                self.rows[target], origin[target] = row, source
        self.lengths = self.lengths[origin]
        sources = self._tensor([place for place, _ in split])
        for layer in self.cache.layers:
            layer.copy_rows(sources, self._tensor(targets), len(origin))

    def _compact(self, kept: Sequence[tuple[int, DecodingRow]]) -> None:
        places = self._tensor([place for place, _ in kept])
        self.lengths, self.rows = self.lengths[places], [row for _, row in kept]
        first = self.cache.get_seq_length() - int(self.lengths.max())
        layers = [
            (keys[places, :, first:], values[places, :, first:])
            for keys, values in _layers(self.cache)
        ]
        self.cache = _cache([layers])

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.lengths.device)

    def join(self, other: "_Batch") -> "_Batch":
        return _Batch(
            _cache([_layers(self.cache), _layers(other.cache)]),
            torch.cat([self.lengths, other.lengths]),
            torch.cat([self.logits, other.logits]),
            self.rows + other.rows,
        )


def _layers(cache: Cache) -> Layers:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _cache(parts: Sequence[Layers]) -> Cache:
    """One cache with the rows of all parts below one another."""
    # one class for all layers: a layer with a sliding window keeps all its tokens as well
    cache = Cache(layer_class_to_replicate=_BufferedLayer)
    for layer_parts in zip(*parts, strict=True):
        cache.layers.append(_BufferedLayer())
        cache.layers[-1].hold(layer_parts)
    return cache


class Decoder:
    """A causal LM, its tokenizer and the ids that end a text.

    Its attention is full, or has a sliding window that is longer than the texts."""

    def __init__(self, model: Any, tokenizer: Any, eos_ids: set[int], style: Style = USUAL):
        self.model, self.tokenizer, self.eos_ids, self.style = model, tokenizer, eos_ids, style
        self.context = getattr(model.config, "max_position_embeddings", 2048)
        # ids -> the cache of all of them but the last
        self._kept: OrderedDict[tuple[int, ...], Layers] = OrderedDict()
        self._kept_bytes = 0
        self._newlines: dict[int, bool] = {}

    # --- where steps end ---

    def step_ends(self, ids: Sequence[int]) -> list[int]:
        """The number of ids up to the end of each step.

        A token with a newline ends a step, if the step has more than white space. Text behind the
        last newline is a step too; white space there belongs to the step before."""
        ends, start = [], 0
        for position, token in enumerate(ids, 1):
            if (position == len(ids) or self._breaks(token)) and self.text(ids[start:position]):
                ends.append(position)
                start = position
        return [*ends[:-1], len(ids)] if ends else []

    def new_steps(self, row: DecodingRow) -> list[tuple[int, str]]:
        """(the number of the row's ids up to its end, its text in one line) of each new step.

        With another separator than a newline a step ends with the token that completes its
        separator; text behind the last one is a step too, and white space there belongs to the step
        before. Of a row that ended with a step, the ids behind it begin the next step."""
        if self.style.has_plain_steps:
            ends = self.step_ends(row.ids)
            starts = [0, *ends]
            return [(b, self.text(row.ids[a:b])) for a, b in zip(starts, ends, strict=False)]
        ids, separator = [*row.solution, *row.ids], self.style.separator
        text, at, found = self._raw(ids), 0, []
        at = self._answer_start(text)
        while (length := separator.end(text[at:])) is not None:
            step = separator.step(self._without_special(text[at : at + length]))
            at += length
            found.append((self._position(ids, at) - len(row.solution), step))
        rest = separator.step(self._without_special(text[at:]))
        if row.ended == "step":
            return found[row.steps : row.steps + 1]
        if rest:
            found.append((len(row.ids), rest))
        elif found:
            found[-1] = (len(row.ids), found[-1][1])
        return found[row.steps :]

    def answer_text(self, ids: Sequence[int]) -> str:
        """The text of a response as it was written, without thoughts if they are cut."""
        text = self._raw(ids)
        return self._without_special(text[self._answer_start(text) :])

    @cached_property
    def _opened(self) -> str:
        """The mark behind a prompt in which the model's thoughts begin, if they are cut."""
        if not self.style.cuts_thoughts:
            return ""
        text = format_prompt(FIELD, self.tokenizer, thinks=True)
        return open_thought(text.rpartition(FIELD)[2])

    def _answer_start(self, text: str) -> int:
        """Where the steps of a solution begin in its text, behind thoughts that are cut."""
        if not self.style.cuts_thoughts:
            return 0
        return max(0, answer_start(self._opened + text) - len(self._opened))

    def _raw(self, ids: Sequence[int]) -> str:
        """The text of ids in which thoughts and separators are found: where thoughts are cut with
        special tokens, which may mark thoughts."""
        skip = not self.style.cuts_thoughts
        settings = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(ids, **settings)

    def _without_special(self, text: str) -> str:
        """A part of a `_raw` text without special tokens."""
        if self.style.cuts_thoughts:
            for token in self.tokenizer.all_special_tokens:
                text = text.replace(token, "")
        return text

    def _position(self, ids: Sequence[int], at: int) -> int:
        """The fewest ids whose text has `at` letters."""
        return bisect_left(range(len(ids)), at, key=lambda k: len(self._raw(ids[:k])))

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids in one line, without special tokens."""
        return " ".join(self.decode_text(ids).split())

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of ids as it was written, without special tokens."""
        settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(ids, **settings)

    def _breaks(self, token: int) -> bool:
        if token not in self._newlines:
            self._newlines[token] = "\n" in self.tokenizer.decode([token])
        return self._newlines[token]

    # --- decoding ---

    @torch.inference_mode()
    def decode(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        one_step: bool = False,
        top_p: float | None = None,
        begun: Sequence[tuple[Sequence[int], int]] | None = None,
    ) -> Iterator[list[DecodingRow]]:
        """Draw n samples of every prefix; after every token yield the rows that got one.

        A sample ends at EOS, after `max_new_tokens`, at the end of the model's context or, with
        `one_step`, at the end of a step. Prefixes are ids, at least one and fewer than the context.
        top_p: instead of that of the style. begun: `solution` and `steps` of the prefixes' rows.

        The random numbers of a sample depend on the seed, the prefix and the number of the sample
        alone, so a sample is the same whatever else is decoded."""
        waiting = [
            DecodingRow(k, [*range(n)], min(max_new_tokens, self.context - len(ids)), None, *step)
            for k, (ids, step) in enumerate(
                zip(prefixes, begun or [((), 0)] * len(prefixes), strict=True)
            )
        ]
        top_p = self.style.top_p if top_p is None else top_p
        waiting.sort(key=lambda row: -len(prefixes[row.prefix]))  # similar lengths enter together

        def all_ids(row: DecodingRow) -> tuple[int, ...]:
            return (*prefixes[row.prefix], *row.ids)

        batch: _Batch | None = None
        while waiting or batch:
            free = MAX_ROWS - (len(batch.rows) if batch else 0)
            if waiting and (batch is None or free >= (1 - COMPACT_AT) * MAX_ROWS):
                entering = [waiting.pop() for _ in range(min(len(waiting), free))]
                for row in entering:
                    if temperature and row.uniforms is None:
                        row.uniforms = _uniforms(seed, all_ids(row), row)
                for group in self._enter([(all_ids(row), row) for row in entering]):
                    batch = batch.join(group) if batch else group
            assert batch is not None  # either it was there, or rows entered
            drawn = self._draw(batch, temperature, top_p)
            written: list[DecodingRow] = []
            kept: list[tuple[int, DecodingRow]] = []
            for place, (row, tokens) in enumerate(zip(batch.rows, drawn, strict=True)):
                for part in row.add(tokens) if not row.ended else ():
                    written.append(part)
                    part.ended = self._ending(part, one_step)
                    if part.ended == "step":
                        self._keep(all_ids(part), batch, place)
                    elif not part.ended and len(kept) < MAX_ROWS:
                        kept.append((place, part))
                    elif not part.ended:  # too many rows were split: this one waits
                        self._keep(all_ids(part), batch, place)
                        waiting.append(part)
            yield written
            if not kept:
                batch = None
                continue
            batch.keep(kept)
            batch.lengths = batch.lengths + 1
            ids = torch.tensor([row.ids[-1:] for row in batch.rows], device=batch.lengths.device)
            batch.logits = self._read(batch.cache, batch.lengths, ids)

    def _ending(self, row: DecodingRow, one_step: bool) -> str:
        """How the row ended with its last token, or an empty text."""
        if row.ids[-1] in self.eos_ids:
            return "finished"
        if one_step and self._ends_step(row):
            return "step"
        return "cut" if len(row.ids) >= row.limit else ""

    def _ends_step(self, row: DecodingRow) -> bool:
        if self.style.has_plain_steps:
            return self._breaks(row.ids[-1]) and bool(self.text(row.ids))
        text = self._raw([*row.solution, *row.ids])
        text = text[self._answer_start(text) :]
        for _ in range(row.steps + 1):
            end = self.style.separator.end(text)
            if end is None:
                return False
            text = text[end:]
        return True

    def _draw(self, batch: _Batch, temperature: float, top_p: float) -> list[list[int]]:
        """The next token of every row's samples, all rows padded to the most samples.

        It is the likeliest at temperature 0, else the first one whose cumulative probability is
        above the sample's next random number."""
        most = max(len(row.samples) for row in batch.rows)
        if temperature == 0:
            return batch.logits.argmax(-1, keepdim=True).expand(-1, most).tolist()
        cumulative = kept_probabilities(batch.logits / temperature, self.style.top_k, top_p).cumsum(
            -1
        )
        uniforms: Any = np.zeros((len(batch.rows), most), dtype=np.float32)
        for place, row in enumerate(batch.rows):
            if not row.ended:
                uniforms[place, : len(row.samples)] = row.uniforms[row.samples, len(row.ids)]
        thresholds = torch.from_numpy(uniforms).to(cumulative.device) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, thresholds, right=True)
        return drawn.clamp(max=cumulative.size(1) - 1).tolist()

    def _read(self, cache: Cache, lengths: Tensor, ids: Tensor, head: int = 0) -> Tensor:
        """Read ids (R, M) into the cache. Returns the logits (R, V) of the next token.

        lengths (R,): the tokens of a row after reading; they are its last columns, but for the
        first `head` tokens, which are its first columns. M is above 1 only for a cache that has
        nothing else; ids are padded on the left."""
        columns = cache.get_seq_length() + ids.size(1)
        numbers = torch.arange(columns, device=ids.device)
        places = numbers - (columns - lengths)[:, None]  # (R, columns), below `head` at padding
        # the clamp: rows that have ended may grow beyond the context before they leave
        inputs = {
            "input_ids": ids,
            "attention_mask": ((places >= head) | (numbers < head)).long(),
            "position_ids": places[:, -ids.size(1) :].clamp(0, self.context - 1),
        }
        output = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].float()

    def _enter(self, entering: Sequence[tuple[tuple[int, ...], DecodingRow]]) -> Iterator[_Batch]:
        """Batches of new rows, each row given with all its ids.

        One batch has the rows whose cache was kept; the rows of the other are read completely."""
        kept = [(ids, row) for ids, row in entering if ids in self._kept]
        for group in (kept, [(ids, row) for ids, row in entering if ids not in self._kept]):
            if not group:
                continue
            lengths = torch.tensor([len(ids) for ids, _ in group], device=self.model.device)
            if group is kept:
                cache = _cache([self._kept[ids] for ids, _ in group])
                unread = [ids[-1:] for ids, _ in group]
                for ids, row in group:
                    if row.ids:  # it waited for a place: no other row continues from within a step
                        self._kept_bytes -= _bytes(self._kept.pop(ids))
                    else:
                        self._kept.move_to_end(ids)
            else:
                cache, longest = _cache([]), int(lengths.max())
                texts = [ids for ids, _ in group]
                head = min(shared_head(texts), int(lengths.min()) - 1)
                if head and len(group) > 1:
                    yield self._with_head(head, texts, lengths, [row for _, row in group])
                    continue
                unread = [(0,) * (longest - len(ids)) + ids for ids in texts]
            logits = self._read(cache, lengths, torch.tensor(unread, device=self.model.device))
            yield _Batch(cache, lengths, logits, [row for _, row in group])

    def _with_head(
        self, head: int, texts: Sequence[tuple[int, ...]], lengths: Tensor, rows: list[DecodingRow]
    ) -> _Batch:
        """A batch of new rows, given with all their ids, of which they share the first `head`."""
        device, longest = lengths.device, int(lengths.max())
        shared = DynamicCache()  # of one class of layers, as in `_cache`
        start = torch.tensor([texts[0][:head]], device=device)
        self._read(shared, torch.tensor([head], device=device), start)
        shared.batch_repeat_interleave(len(texts))
        unread = [(0,) * (longest - len(ids)) + ids[head:] for ids in texts]
        logits = self._read(shared, lengths, torch.tensor(unread, device=device), head)
        # the head moves next to the other tokens of its row: (R, columns), where each comes from
        numbers = torch.arange(longest, device=device)
        places = numbers - (longest - lengths)[:, None]
        source = torch.where(places < head, places.clamp(min=0), numbers)[:, None, :, None]
        layers = [
            (
                keys.gather(2, source.expand(-1, keys.size(1), -1, keys.size(3))),
                values.gather(2, source.expand(-1, values.size(1), -1, values.size(3))),
            )
            for keys, values in _layers(shared)
        ]
        return _Batch(_cache([layers]), lengths, logits, rows)

    def _keep(self, ids: tuple[int, ...], batch: _Batch, place: int) -> None:
        """Keep the cache of a row for later rows that continue from its ids.

        The last id is not in the cache, because it has not been read yet."""
        if ids in self._kept:
            return
        length = int(batch.lengths[place])
        layers = [
            (keys[place, None, :, -length:].clone(), values[place, None, :, -length:].clone())
            for keys, values in _layers(batch.cache)
        ]
        self._kept[ids] = layers
        self._kept_bytes += _bytes(layers)
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= _bytes(self._kept.popitem(last=False)[1])


def kept_probabilities(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The probabilities (R, V) of tokens, 0 for those that are not drawn; the others are not
    normalized again.

    logits (R, V): divided by the temperature. The top_k likeliest tokens are kept (0: all; more, if
    several are equally likely), and of these the likeliest that together reach top_p (Holtzman et
    al. 2020)."""
    if top_k:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the tokens before it reach top_p
        probabilities = probabilities.masked_fill(beyond.gather(-1, order.argsort(-1)), 0)
    return probabilities


def _bytes(layers: Layers) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in layers)


def _uniforms(seed: int, prefix: tuple[int, ...], row: DecodingRow) -> Any:
    """Random numbers for the samples of a new row, (samples, limit), in [0, 1)."""

    def draw(sample: int) -> Any:
        key = hashlib.blake2b(repr((seed, prefix, sample)).encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key)))
        return generator.random(row.limit, dtype=np.float32)

    return np.array([draw(sample) for sample in row.samples])
