"""Tree attention: several texts with a shared prefix in one row of a batch, the prefix read once.

A row is a tree of tokens, in which a token attends to itself and to its ancestors (Miao et al.
2023, arXiv 2305.09781). A row may also continue a prefix that was read before and whose cache was
kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache


@dataclass(eq=False)
class CachedPrefix:
    """A text that was read before.

    layers: the cache of its batch, (keys, values) for each layer, each (B, H, T, D). row, columns:
    the place of the text in that cache. score: the score of its last step."""

    layers: list[tuple[Tensor, Tensor]]
    row: int
    columns: list[int]
    score: float

    def __len__(self) -> int:
        return len(self.columns)


def supports_tree_attention(model: Any, max_length: int | None) -> bool:
    """Whether the model can read trees: its attention takes a mask, and no window is too short.

    The attention has to be sdpa or eager; a sliding window has to be at least `max_length` tokens.
    Other models read every text in a row of its own."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return (
        getattr(model, "_supports_attention_backend", False)
        and config._attn_implementation in ("sdpa", "eager")
        and (window is None or (max_length is not None and max_length <= window))
    )


def mask_dtype(model: Any) -> torch.dtype:
    """The dtype of the masks that the model's attention takes.

    sdpa takes torch.bool. Eager attention adds the mask to its scores, so the mask has the dtype of
    the weights: 0 where a token attends, the lowest number elsewhere."""
    is_sdpa = model.config.get_text_config()._attn_implementation == "sdpa"
    return torch.bool if is_sdpa else model.dtype


def add_sequence(
    ids: list[int], parents: list[int], path: list[int], tokens: list[int], shared: int
) -> list[int]:
    """Add a text to the row `ids`, `parents`. Returns the places of all its tokens.

    The first `shared` tokens are already in the row, at the places `path`; the others are appended.
    parents: for each token of the row the place of the token before it in its text, -1 for none."""
    path = path[:shared]
    for token in tokens[shared:]:
        parents.append(path[-1] if path else -1)
        path.append(len(ids))
        ids.append(token)
    return path


def tree_inputs(
    ids: list[list[int]],
    parents: list[list[int]],
    pad_token_id: int,
    prefixes: Sequence[CachedPrefix] = (),
    dtype: torch.dtype = torch.bool,
) -> dict[str, Tensor]:
    """The model's inputs for rows of trees.

    They are `input_ids` (B, L), right-padded, and if any row branches or continues a prefix also
    `attention_mask` (B, 1, L, P + L) and `position_ids` (B, L).

    P is the length of the longest prefix; shorter ones are aligned at its right end. A token
    attends to itself and its ancestors; its position is the number of its ancestors. dtype: see
    `mask_dtype`. Rows without branches need no mask: causal attention never reaches padding on the
    right."""
    longest = max(map(len, ids))

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    inputs = {"input_ids": padded(ids, pad_token_id)}
    if not prefixes and all(row == [*range(-1, len(row) - 1)] for row in parents):
        return inputs
    before, rows = padded(parents, -1), torch.arange(len(ids))
    # (B, L, L); padding attends to itself, because a softmax over no token would be NaN
    attends = torch.eye(longest, dtype=torch.bool).repeat(len(ids), 1, 1)
    for place in range(longest):  # a parent comes before its children
        has_parent = (before[:, place] >= 0)[:, None]
        attends[:, place] |= attends[rows, before[:, place]] & has_parent
    if prefixes:
        lengths = torch.tensor([len(prefix) for prefix in prefixes])[:, None]
        in_prefix = torch.arange(int(lengths.max())) >= lengths.max() - lengths  # (B, P)
        attends = torch.cat([in_prefix[:, None].expand(-1, longest, -1), attends], -1)
    mask = attends[:, None]
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return {**inputs, "attention_mask": mask, "position_ids": attends.sum(-1) - 1}


def stack_caches(prefixes: Sequence[CachedPrefix]) -> Cache:
    """The prefixes as one cache with a row for each, aligned at their right end."""
    cache, longest = DynamicCache(), max(map(len, prefixes), default=0)

    def states(prefix: CachedPrefix, layer: int, kind: int) -> Tensor:  # kind: 0 keys, 1 values
        kept = prefix.layers[layer][kind][prefix.row][:, prefix.columns]  # (H, T, D)
        return pad(kept, (0, 0, longest - len(prefix), 0))

    for layer in range(len(prefixes[0].layers) if prefixes else 0):
        keys, values = (
            torch.stack([states(prefix, layer, kind) for prefix in prefixes]) for kind in (0, 1)
        )
        cache.update(keys, values, layer)
    return cache
