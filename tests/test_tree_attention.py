"""Rows of trees: their masks and positions, and the logits that a model gives for them."""

import pytest
import torch

from lm.tree_attention import (
    CachedPrefix,
    add_sequence,
    mask_dtype,
    stack_caches,
    supports_tree_attention,
    tree_inputs,
)

T, F = True, False
# a row with a trunk 5 6, after which 7 8 and 9 branch off; and a shorter row without branches
IDS = [[5, 6, 7, 8, 9], [3, 4]]
PARENTS = [[-1, 0, 1, 2, 1], [-1, 0]]
TREE = [[T, F, F, F, F], [T, T, F, F, F], [T, T, T, F, F], [T, T, T, T, F], [T, T, F, F, T]]
CHAIN = [
    [T, F, F, F, F],
    [T, T, F, F, F],
    [F, F, T, F, F],  # padding attends to itself
    [F, F, F, T, F],
    [F, F, F, F, T],
]


def prefix(length: int) -> CachedPrefix:
    return CachedPrefix([], 0, [*range(length)], 0.0)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


def test_add_sequence_appends_what_is_not_shared():
    ids: list[int] = []
    parents: list[int] = []
    assert add_sequence(ids, parents, [], [5, 6, 7, 8], 0) == [0, 1, 2, 3]
    assert add_sequence(ids, parents, [0, 1, 2, 3], [5, 6, 9], 2) == [0, 1, 4]
    assert add_sequence(ids, parents, [0, 1, 4], [5, 6], 2) == [0, 1]
    assert (ids, parents) == ([5, 6, 7, 8, 9], [-1, 0, 1, 2, 1])


def test_inputs_of_a_tree_written_out():
    inputs = tree_inputs(IDS, PARENTS, pad_token_id=0)
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    mask = torch.tensor([[TREE], [CHAIN]])
    assert inputs["attention_mask"].shape == (2, 1, 5, 5)
    assert torch.equal(inputs["attention_mask"], mask)
    for dtype in (torch.float32, torch.bfloat16):
        added = tree_inputs(IDS, PARENTS, 0, dtype=dtype)
        assert added["attention_mask"].dtype == dtype
        assert torch.equal(added["attention_mask"], additive(mask, dtype))
        assert torch.equal(added["position_ids"], inputs["position_ids"])


def test_inputs_behind_prefixes_written_out():
    """Prefixes of 1 and 3 tokens, aligned at the right, in front of the same rows."""
    inputs = tree_inputs(IDS, PARENTS, 0, [prefix(1), prefix(3)])
    assert inputs["position_ids"].tolist() == [[1, 2, 3, 4, 3], [3, 4, 3, 3, 3]]
    mask = torch.tensor([[[[F, F, T, *row] for row in TREE]], [[[T, T, T, *row] for row in CHAIN]]])
    assert torch.equal(inputs["attention_mask"], mask)
    added = tree_inputs(IDS, PARENTS, 0, [prefix(1), prefix(3)], torch.float32)
    assert torch.equal(added["attention_mask"], additive(mask, torch.float32))
    # a row without branches needs a mask as well, if it continues a prefix
    assert "attention_mask" in tree_inputs([[3, 4]], [[-1, 0]], 0, [prefix(2)])


def test_rows_without_branches_need_no_mask():
    inputs = tree_inputs([[5, 6, 7], [8]], [[-1, 0, 1], [-1]], pad_token_id=0)
    assert inputs.keys() == {"input_ids"} and inputs["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]


def test_caches_are_aligned_at_their_right_end():
    keys = torch.arange(1.0, 9.0).reshape(2, 1, 4, 1)  # rows 1 2 3 4 and 5 6 7 8
    layers = [(keys, keys + 10)]
    short, long = CachedPrefix(layers, 0, [0], 0.5), CachedPrefix(layers, 1, [0, 2, 3], 0.5)
    cache = stack_caches([short, long])
    assert cache.layers[0].keys[..., 0].tolist() == [[[0, 0, 1]], [[5, 7, 8]]]
    assert cache.layers[0].values[..., 0].tolist() == [[[0, 0, 11]], [[15, 17, 18]]]
    assert stack_caches([]).get_seq_length() == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_tree_row_has_the_logits_of_its_texts_alone(tiny_model_dir, attention):
    """Without and with a prefix that was read before. (Eager attention adds a mask to its scores: a
    bool mask gave other logits without an error.)"""
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": attention, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, **options).eval()
    assert supports_tree_attention(model, 512)
    dtype = mask_dtype(model)
    assert dtype == (torch.bool if attention == "sdpa" else torch.float32)
    texts = [[1, 40, 41, 42, 43], [1, 40, 41, 50], [1, 40, 60, 61, 62, 63]]
    ids: list[int] = []
    parents: list[int] = []
    paths = [add_sequence(ids, parents, [], texts[0], 0)]
    paths += [
        add_sequence(ids, parents, paths[0], text, k) for text, k in ((texts[1], 3), (texts[2], 2))
    ]
    assert len(ids) == 10 < sum(map(len, texts))
    other = [1, 70, 71]  # a second row, so that there is padding
    chain = [*range(-1, len(other) - 1)]
    with torch.inference_mode():
        alone = [model(torch.tensor([text])).logits[0] for text in [*texts, other]]
        row, second = model(**tree_inputs([ids, other], [parents, chain], 0, dtype=dtype)).logits
        for path, expected in zip(paths, alone, strict=False):
            torch.testing.assert_close(row[path], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(second[:3], alone[3], atol=1e-4, rtol=1e-4)

        # the first two tokens are read in advance, as the prefix of one row; the other row has one
        read = model(torch.tensor([[1, 40]]), use_cache=True).past_key_values
        layers = [(layer.keys, layer.values) for layer in read.layers]
        prefixes = [CachedPrefix(layers, 0, [0, 1], 0.0), CachedPrefix(layers, 0, [0], 0.0)]
        rest = [parent - 2 if parent > 1 else -1 for parent in parents[2:]]
        inputs = tree_inputs([ids[2:], other[1:]], [rest, [-1, 0]], 0, prefixes, dtype)
        row, second = model(**inputs, past_key_values=stack_caches(prefixes)).logits
        for path, expected in zip(paths, alone, strict=False):
            places = [place - 2 for place in path[2:]]
            torch.testing.assert_close(row[places], expected[2:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(second[:2], alone[3][1:], atol=1e-4, rtol=1e-4)


def test_a_window_shorter_than_a_row_or_another_attention_is_refused(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert supports_tree_attention(model, None)
    model.config.sliding_window = 100
    assert supports_tree_attention(model, 100)
    assert not supports_tree_attention(model, 101) and not supports_tree_attention(model, None)
    model.config.sliding_window = None
    model.config._attn_implementation = "flash_attention_2"
    assert not supports_tree_attention(model, 100)
