"""Packed batches: the texts of a preference batch as trees of tokens, each token read once.

Chosen and rejected begin with the same prompt and prefix, often with the same steps; the pairs of
one state of a search tree share more. A batch of B pairs stays as TRL makes it, 2B rows; its key
`packed` holds the same texts as trees (lm/tree_attention.py), and a model that `add_packing` has
prepared reads the trees instead of the rows. It returns what it would return for the rows, so
losses and metrics need not know about packing.

Where a text leaves the others, its first token is predicted by the last token that they share: the
hidden state there is used once for every branch.
"""

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers.utils import ModelOutput

from lm.tree_attention import add_sequence, tree_inputs

PACKINGS = ("pairs", "siblings", "none")
Tree = tuple[list[int], list[int]]  # ids, and the place of the token before each (-1 for none)


def pack_batch(
    texts: Sequence[list[int]],
    groups: Sequence[Any],
    scored: Tensor,
    pad_token_id: int,
    dtype: torch.dtype = torch.bool,
    multiple: int = 1,
) -> dict[str, Tensor]:
    """The texts of a batch as trees, the trees of short texts behind one another in one row.

    texts: N lists of ids; groups: N keys, texts with the same key become one tree; scored (N, L - 1)
    bools: whether the token behind a column has a log-prob. Rows have a multiple of `multiple`
    tokens. dtype: see `mask_dtype`. Returns

    - the keys of `tree_inputs`: `input_ids` (R, T), and where rows branch a mask and positions
    - `labels` (U,): the different tokens with a log-prob; `predictors` (U,): the place of the token
      before each, an index into the flat (R * T,) rows
    - `index` (S,): for each True of `scored`, row by row, its index into `labels`."""
    trees: list[Tree] = []
    paths: dict[int, tuple[int, list[int]]] = {}  # text -> its tree, the places of its tokens there
    members: dict[Any, list[int]] = {}
    for k, group in enumerate(groups):
        members.setdefault(group, []).append(k)
    for group in members.values():
        tree: Tree = ([], [])
        path: list[int] = []
        before: list[int] = []
        # sorted: a text shares most with the one before it
        for k in sorted(group, key=lambda k: texts[k]):
            path = add_sequence(*tree, path, texts[k], _shared(before, texts[k]))
            paths[k] = len(trees), path
            before = texts[k]
        trees.append(tree)
    rows, offsets = _join(trees, multiple, pad_token_id)
    inputs = tree_inputs(*map(list, zip(*rows, strict=True)), pad_token_id, dtype=dtype)
    width = inputs["input_ids"].size(1)

    # own place of every token with a log-prob -> the place of the token before it
    predictors: dict[int, int] = {}
    places: list[int] = []
    for k, columns in enumerate(scored.tolist()):
        tree_number, path = paths[k]
        row, start = offsets[tree_number]
        first = row * width + start
        for column, has_logp in enumerate(columns):
            if has_logp:
                places.append(first + path[column + 1])
                predictors[places[-1]] = first + path[column]
    order = {place: number for number, place in enumerate(predictors)}
    own = torch.tensor([*predictors], dtype=torch.long)
    return {
        **inputs,
        "labels": inputs["input_ids"].flatten()[own],
        "predictors": torch.tensor([*predictors.values()], dtype=torch.long),
        "index": torch.tensor([order[place] for place in places], dtype=torch.long),
    }


def _shared(first: list[int], second: list[int]) -> int:
    """The number of tokens with which both begin."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


def _join(
    trees: Sequence[Tree], multiple: int, pad_token_id: int
) -> tuple[list[Tree], list[tuple[int, int]]]:
    """Rows of trees, no row longer than the longest tree; (row, first place) of every tree.

    The largest trees are placed first, each in the first row that has room for it."""
    longest = max(len(ids) for ids, _ in trees)
    longest += -longest % multiple
    rows: list[Tree] = []
    offsets = [(0, 0)] * len(trees)
    for number in sorted(range(len(trees)), key=lambda number: -len(trees[number][0])):
        ids, parents = trees[number]
        for row, (row_ids, row_parents) in enumerate(rows):
            if len(row_ids) + len(ids) <= longest:
                break
        else:
            row, row_ids, row_parents = len(rows), [], []
            rows.append((row_ids, row_parents))
        start = len(row_ids)
        offsets[number] = row, start
        row_ids += ids
        row_parents += [parent if parent < 0 else parent + start for parent in parents]
    for ids, parents in rows[:1]:  # as long as the others will be padded
        parents += [-1] * (longest - len(ids))
        ids += [pad_token_id] * (longest - len(ids))
    return rows, offsets


def add_packing(model: Any) -> None:
    """Let a model with TRL's fused head read `packed` batches.

    `model(..., labels=labels, packed=pack_batch(...), fused_lm_head=True)` returns what it returns
    without `packed`: the same numbers for each token, (2B, L - 1). Without the fused head, `packed`
    is left out. A second call changes nothing."""
    if hasattr(model.forward, "reads_packed"):
        return
    forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against the signature
    def packed_forward(
        self: Any, *args: Any, packed: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        if packed is None or not kwargs.get("fused_lm_head"):
            return forward(*args, **kwargs)
        where = kwargs["labels"][:, 1:] != -100  # (2B, L - 1)
        for name in ("input_ids", "attention_mask", "position_ids"):
            kwargs[name] = packed.get(name)
        kwargs |= {"labels": None, "shift_labels": packed["labels"][None]}
        with _only(self.base_model, packed["predictors"]):
            outputs = forward(**kwargs)
        for name, value in outputs.items():
            if name != "loss" and isinstance(value, Tensor) and value.dim() == 2:  # (1, U)
                # `masked_scatter` keeps the gradient, also if no label is left
                spread = value.new_zeros(where.shape)
                outputs[name] = spread.masked_scatter(where, value[0, packed["index"]])
        return outputs

    packed_forward.reads_packed = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(packed_forward, model)


@contextmanager
def _only(backbone: Any, places: Tensor) -> Iterator[None]:
    """Let the backbone return the hidden states (1, U, H) of these places of its flat rows only.

    The head then computes logits for tokens with a label and for no others."""

    def select(module: Any, args: Any, output: ModelOutput) -> ModelOutput:
        output["last_hidden_state"] = output.last_hidden_state.flatten(0, 1)[places][None]
        return output

    handle = backbone.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


class SiblingSampler(Sampler[int]):
    """Rows in a random order in which those of one group follow one another.

    groups: a key for each row; epoch(): the number of the current epoch. The order depends on the
    seed and the epoch alone, so that a resumed training and every process have the same."""

    def __init__(self, groups: Sequence[Any], seed: int, epoch: Callable[[], int]):
        members: dict[Any, list[int]] = {}
        for row, group in enumerate(groups):
            members.setdefault(group, []).append(row)
        self.members, self.count = list(members.values()), len(groups)
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        for number in torch.randperm(len(self.members), generator=generator).tolist():
            yield from self.members[number]

    def __len__(self) -> int:
        return self.count
