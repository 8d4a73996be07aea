"""Several solutions of one prompt in one row of a batch: what they begin with alike is read once. The row is a tree of tokens, in
which a token sees itself and those that lead to it (as in tree attention, Miao et al. 2023, arXiv 2305.09781). It may go on from a
text that was read before."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache


@dataclass(eq=False)
class Past:
    """A text that was read: where in the cache of its batch it lies, (keys, values) a layer, (B, H, T, D) each; the score of its
    last step."""

    layers: list[tuple[Tensor, Tensor]]
    row: int
    columns: list[int]
    score: float

    def __len__(self) -> int:
        return len(self.columns)


def takes_branches(model, max_length: int | None) -> bool:
    """Whether the model reads a mask of our own in full: its attention is one of torch's, and has no window that is shorter than a
    row. Other models get every solution as a row of its own."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return (
        getattr(model, "_supports_attention_backend", False)
        and config._attn_implementation in ("sdpa", "eager")
        and (window is None or (max_length is not None and max_length <= window))
    )


def graft(
    ids: list[int], parents: list[int], path: list[int], tokens: list[int], shared: int
) -> list[int]:
    """Put a text into a row, where it leaves the text at `path` behind its first `shared` tokens. parents: the place of the token
    before each, -1 for none. Returns where its tokens lie."""
    path = path[:shared]
    for token in tokens[shared:]:
        parents.append(path[-1] if path else -1)
        path.append(len(ids))
        ids.append(token)
    return path


def as_inputs(
    ids: list[list[int]], parents: list[list[int]], pad_token_id: int, pasts: Sequence[Past] = ()
) -> dict[str, Tensor]:
    """`input_ids` (B, L), right-padded. Where a row branches, or goes on from a past, also `attention_mask` (B, 1, L, P + L), by
    which a token sees itself and those that lead to it, and `position_ids` (B, L), how many these are; P is the longest past, and
    shorter ones lie at its right end. Else causal attention does: it never sees the padding."""
    longest = max(map(len, ids))

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    inputs = {"input_ids": padded(ids, pad_token_id)}
    if pasts or any(row != [*range(-1, len(row) - 1)] for row in parents):
        before, rows = padded(parents, -1), torch.arange(len(ids))
        sees = torch.eye(longest, dtype=torch.bool).repeat(len(ids), 1, 1)
        for place in range(longest):  # a parent stands before its children
            sees[:, place] |= sees[rows, before[:, place]] & (before[:, place] >= 0)[:, None]
        if pasts:
            lengths = torch.tensor([len(past) for past in pasts])[:, None]
            behind = torch.arange(int(lengths.max())) >= lengths.max() - lengths  # (B, P)
            sees = torch.cat([behind[:, None].expand(-1, longest, -1), sees], -1)
        inputs |= {"attention_mask": sees[:, None], "position_ids": sees.sum(-1) - 1}
    return inputs


def as_cache(pasts: Sequence[Past]) -> Cache:
    """The pasts as a cache to go on from, a row each, aligned at their right end."""
    cache, longest = DynamicCache(), max(map(len, pasts), default=0)
    for index in range(len(pasts[0].layers) if pasts else 0):
        both = (
            torch.stack(
                [
                    pad(
                        past.layers[index][k][past.row][:, past.columns],
                        (0, 0, longest - len(past), 0),
                    )
                    for past in pasts
                ]
            )
            for k in (0, 1)
        )
        cache.update(*both, index)
    return cache
