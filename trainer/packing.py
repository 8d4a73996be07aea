"""Packed batches: the texts of a preference batch as trees of tokens, each token read once.

Chosen and rejected begin with the same prompt and prefix, often with the same steps; the pairs of
one state of a search tree share more. A batch of B pairs stays as TRL makes it, 2B rows; its key
`packed` holds the same texts as trees (lm/tree_attention.py). A model prepared by
`extend_fused_head` reads the trees instead of the rows. It returns what it would return for the
rows, so losses and metrics need not know about packing.

Where a text leaves the others, its first token is predicted by the last token that they share: the
hidden state there is used once for every branch.
"""

import functools
import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Sampler
from transformers.utils import ModelOutput

from lm.tree_attention import add_sequence, shared_head, supports_tree_attention, tree_inputs
from reasoning.steps import shared_prefix

PACKINGS = ("pairs", "siblings", "none")
CPU_BLOCK = 512  # tokens; smaller blocks have less padding, but slower matrix products


def why_unpacked(model: Any, max_length: int | None, has_aux_loss: bool) -> str:
    """Why a model cannot read packed batches; an empty text if it can."""
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        return "the adapter puts virtual tokens in front"
    if has_aux_loss:
        return "the model's auxiliary loss counts the tokens of every text"
    if not supports_tree_attention(model, max_length):
        return "the model's attention does not take the mask of a tree"
    return ""


def texts_of(batch: dict[str, Tensor]) -> list[list[int]]:
    """The ids of every row of a batch, without the padding on the right."""
    rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True)
    return [ids[:length] for ids, length in rows]


def pack_batch(
    texts: Sequence[list[int]],
    groups: Sequence[Any],
    scored: Tensor,
    pad_token_id: int,
    dtype: torch.dtype = torch.bool,
    multiple: int = 1,
    block_tokens: float = math.inf,
) -> dict[str, Any]:
    """The texts of a batch as rows of trees, in blocks of rows of similar length.

    texts: N lists of ids; groups: N keys, texts with the same key become one tree; scored
    (N, L - 1) bools: whether the token behind a column has a log-prob. dtype: see `mask_dtype`.
    Rows are padded to a multiple of `multiple` tokens. A block has about `block_tokens` tokens. If
    these are limited and all texts have a common start (`shared_head`), such as that of a chat
    template, several groups become one tree of at most that many tokens. Returns

    - `blocks`: for each block the inputs of `tree_inputs`, (R, T)
    - `labels` (U,): the different tokens with a log-prob; `predictors` (U,): the place of the token
      before each, counted over all rows of all blocks, padding included
    - `index` (S,): for each True of `scored`, row by row, its index into `labels`."""
    trees = [_tree(members, texts) for members in _larger(_members(groups), texts, block_tokens)]
    trees.sort(key=lambda tree: -len(tree.ids))
    blocks: list[list[_Tree]] = []
    for tree in trees:
        if not blocks or sum(len(other.ids) for other in blocks[-1]) >= block_tokens:
            blocks.append([])
        blocks[-1].append(tree)

    # text -> the place of its tree's row, over all blocks; the places of its tokens in the row
    paths: dict[int, tuple[int, list[int]]] = {}
    inputs: list[dict[str, Tensor]] = []
    end = 0
    for block in blocks:
        padding = -len(block[0].ids) % multiple
        block[0].ids.extend([pad_token_id] * padding)
        block[0].parents.extend([-1] * padding)
        ids, parents = [tree.ids for tree in block], [tree.parents for tree in block]
        inputs.append(tree_inputs(ids, parents, pad_token_id, dtype=dtype))
        for tree in block:
            paths |= {text: (end, path) for text, path in tree.paths.items()}
            end += len(block[0].ids)

    # the place of every token with a log-prob -> the place of the token before it
    predictors: dict[int, int] = {}
    places: list[int] = []
    for k, columns in enumerate(scored.tolist()):
        start, path = paths[k]
        for column, has_logp in enumerate(columns):
            if has_logp:
                places.append(start + path[column + 1])
                predictors[places[-1]] = start + path[column]
    order = {place: number for number, place in enumerate(predictors)}
    all_ids = torch.cat([block["input_ids"].flatten() for block in inputs])
    return {
        "blocks": inputs,
        "labels": all_ids[[*predictors]],
        "predictors": torch.tensor([*predictors.values()], dtype=torch.long),
        "index": torch.tensor([order[place] for place in places], dtype=torch.long),
    }


def _members(groups: Sequence[Any]) -> list[list[int]]:
    """The numbers of the rows of each group."""
    members: dict[Any, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    return list(members.values())


def _larger(groups: list[list[int]], texts: Sequence[list[int]], most: float) -> list[list[int]]:
    """The groups, put together to trees of at most `most` tokens if all texts share their head."""
    head = shared_head(texts)
    if not head or most == math.inf:
        return groups
    larger: list[list[int]] = []
    size = math.inf
    for group in groups:
        own = len(_tree(group, texts).ids) - head
        if size + own > most:
            larger.append([])
            size = head
        larger[-1].extend(group)
        size += own
    return larger


class _Tree(NamedTuple):
    """ids, parents: as for `tree_inputs`; paths: text -> the places of its tokens."""

    ids: list[int]
    parents: list[int]
    paths: dict[int, list[int]]


def _tree(members: list[int], texts: Sequence[list[int]]) -> _Tree:
    """The tree of some of the texts."""
    tree = _Tree([], [], {})
    path: list[int] = []
    before: list[int] = []
    # sorted: a text shares most with the one before it
    for k in sorted(members, key=lambda k: texts[k]):
        shared = shared_prefix(before, texts[k])
        path = tree.paths[k] = add_sequence(tree.ids, tree.parents, path, texts[k], shared)
        before = texts[k]
    return tree


def extend_fused_head(model: Any) -> None:
    """Let a model with TRL's fused head read `packed` batches, and on a CPU compute no logits for
    tokens without a label.

    `model(..., labels=labels, packed=pack_batch(...), fused_lm_head=True)` returns what TRL's head
    returns without `packed`: the same numbers for each token, (B, L - 1). Without the fused head,
    `packed` is left out. Of a model with an adapter, its base is prepared. A second call changes
    nothing."""
    model = model.get_base_model() if is_peft_model(model) else model
    if hasattr(model.forward, "reads_packed"):
        return
    forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against the signature
    def packed_forward(
        self: Any, *args: Any, packed: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        labels = kwargs.get("labels")
        if not kwargs.get("fused_lm_head") or labels is None:
            return forward(*args, **kwargs)
        where = labels[:, 1:] != -100  # (B, L - 1)
        others: list[dict[str, Tensor]] = []
        if packed is not None:
            first, *others = packed["blocks"]
            kwargs |= {"attention_mask": None, **first}
            places, kept, index = (packed[key] for key in ("predictors", "labels", "index"))
        elif labels.device.type == "cpu":  # elsewhere TRL's head leaves them out itself
            places = functional.pad(where, (0, 1)).flatten().nonzero()[:, 0]
            kept = labels[:, 1:][where]
            index = torch.arange(len(kept))
        else:
            return forward(*args, **kwargs)
        with _reading(self.base_model, others, places):
            outputs = forward(*args, **kwargs | {"labels": None}, shift_labels=kept[None])
        for name, value in outputs.items():
            if name != "loss" and isinstance(value, Tensor) and value.dim() == 2:  # (1, U)
                # `masked_scatter` keeps the gradient, also if no label is left
                spread = value.new_zeros(where.shape)
                outputs[name] = spread.masked_scatter(where, value[0, index])
        return outputs

    packed_forward.reads_packed = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(packed_forward, model)


@contextmanager
def _reading(backbone: Any, blocks: Sequence[dict[str, Tensor]], places: Tensor) -> Iterator[None]:
    """Let the backbone read these blocks too, after its inputs, and return the hidden states
    (1, U, H) of `places` only: the head computes no logits for tokens without a label."""

    def select(module: Any, args: Any, output: ModelOutput) -> ModelOutput:
        read = [output, *(module.forward(**block, use_cache=False) for block in blocks)]
        states = torch.cat([part.last_hidden_state.flatten(0, 1) for part in read])
        output["last_hidden_state"] = states[places][None]
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
        self.members, self.seed, self.epoch = _members(groups), seed, epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        for number in torch.randperm(len(self.members), generator=generator).tolist():
            yield from self.members[number]

    def __len__(self) -> int:
        return sum(map(len, self.members))
