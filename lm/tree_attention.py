"""Tree attention: several texts with a shared prefix in one row of a batch, the prefix read once.

A row is a tree of tokens, in which a token attends to itself and to its ancestors (Miao et al.
2023, arXiv 2305.09781). A row may also continue a prefix that was read before and whose cache was
kept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache

from reasoning.steps import shared_prefix

# others, such as convolutions, mix a token with the one to its left whatever the mask says
MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
SHARED_HEAD = 16  # the fewest common tokens at the start of all texts that are read only once


def shared_head(texts: Sequence[Any]) -> int:
    """The number of ids with which all texts begin; 0 if they are fewer than SHARED_HEAD.

    texts: lists of ids, or tuples of ids."""
    head = shared_prefix(min(texts), max(texts))  # in sorted order: all others lie between
    return head if head >= SHARED_HEAD else 0


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
    """Whether the model can read trees: a small tree gives what its texts give alone.

    The attention has to be sdpa or eager; a window of its attention has to be at least
    `max_length` tokens. Other models read every text in a row of its own."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    layers = set(getattr(config, "layer_types", None) or ())
    return (
        getattr(model, "_supports_attention_backend", False)
        and layers <= MASKED_LAYERS
        and config._attn_implementation in ("sdpa", "eager")
        and all(size is None or (max_length or math.inf) <= size for size in windows)
        and _reads_trees(model)
    )


def _reads_trees(model: Any) -> bool:
    """Whether the last hidden states of a small tree are those of its texts alone."""
    if any(weight.is_meta or not weight.numel() for weight in model.parameters()):
        return True  # sharded or not loaded: no forward pass is possible here
    rows = model.get_input_embeddings().weight.shape[0]
    trunk, *branches = [[7919 * k % rows for k in part] for part in ((1, 2, 3), (4, 5), (6, 7, 8))]
    ids: list[int] = []
    parents: list[int] = []
    texts = [trunk + branch for branch in branches]
    paths = [add_sequence(ids, parents, [], texts[0], 0)]
    paths.append(add_sequence(ids, parents, paths[0], texts[1], len(trunk)))
    tree = tree_inputs([ids], [parents], 0, dtype=mask_dtype(model))
    device, is_training = model.get_input_embeddings().weight.device, model.training

    whole = model.get_base_model() if hasattr(model, "get_base_model") else model  # of an adapter

    def states(**inputs: Tensor) -> Tensor:
        on_device = {name: value.to(device) for name, value in inputs.items()}
        return whole.base_model(**on_device).last_hidden_state[0].float()

    model.eval()
    with torch.no_grad():
        alone = torch.cat([states(input_ids=torch.tensor([text])) for text in texts])
        places = [place for path in paths for place in path]
        as_tree, as_one_text = states(**tree)[places], states(input_ids=tree["input_ids"])[places]
    model.train(is_training)
    # how far the tree is off, where reading the branches as one text is off by 1
    error = (as_tree - alone).abs().mean() / (as_one_text - alone).abs().mean()
    rounding = 1e-4 if model.dtype == torch.float32 else 0.1
    return bool(error < rounding)


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
    # (B, L, L); padding attends to itself, because a softmax over no token would be NaN
    table = np.broadcast_to(np.eye(longest, dtype=bool), (len(ids), longest, longest)).copy()
    for attended, row in zip(table, parents, strict=True):
        for place, parent in enumerate(row):  # a parent comes before its children
            if parent >= 0:
                attended[place, : parent + 1] = attended[parent, : parent + 1]
    attends = torch.from_numpy(table)
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
