"""The named file type: a Q4_K_M file by llama.cpp's own quantizer (tests/data/q4_k_m) in the judge, against its fp32 parent."""

import importlib.util

import numpy as np
import pytest
import torch

from reward_model.templates import PLAIN
from reward_model.tinyllama_reward_model import NO, YES, TinyLlamaRewardScorer
from tests.conftest import ROOT

HERE = ROOT / "tests/data/q4_k_m"
FILE = HERE / "tiny.Q4_K_M.gguf"


def solution(
    name: str, things: str, has: int, more: int, lost: int, slip: int
) -> tuple[str, list[str]]:
    """A problem and its solution, wrong from the first step on if there is a slip."""
    first = has + more + slip
    prompt = f"{name} has {has} {things}. She buys {more} {things}. She loses {lost}. How many {things} does {name} have now?"
    return prompt, [
        f"Step 1: {has} + {more} = {first}",
        f"Step 2: {first} - {lost} = {first - lost}",
        f"Answer: {first - lost}",
    ]


SOLUTIONS = [
    solution(name, things, *numbers)
    for name, things in [("Mia", "apples"), ("Ana", "books"), ("Zoe", "coins"), ("Kim", "shells")]
    for numbers in [(12, 7, 3, 0), (40, 25, 17, 10), (8, 31, 20, 0), (99, 16, 51, -3)]
]


@pytest.fixture(scope="module")
def scores() -> np.ndarray:
    with TinyLlamaRewardScorer(FILE, threads=1) as judge:
        return np.concatenate(judge.score_steps(SOLUTIONS))


def scores_in_transformers(model, tokenizer) -> np.ndarray:
    """The judge's question in transformers, every text read as a whole."""
    vocabulary, scores = tokenizer.get_vocab(), []
    ids_of = [
        [vocabulary[p] for word in words for p in (word, "▁" + word) if p in vocabulary]
        for words in (YES, NO)
    ]
    for prompt, steps in SOLUTIONS:
        for k in range(len(steps)):
            text = (
                PLAIN.before.format(prompt=prompt)
                + "\n".join(steps[: k + 1])
                + "\n"
                + PLAIN.question
            )
            with torch.inference_mode():
                probability = (
                    model(**tokenizer(text, return_tensors="pt")).logits[0, -1].double().softmax(-1)
                )
            yes, no = (probability[ids].sum().item() for ids in ids_of)
            scores.append(yes / (yes + no))
    return np.array(scores)


def test_the_file_is_what_its_name_says():
    from gguf import GGUFReader, LlamaFileType

    reader = GGUFReader(FILE)
    assert FILE.stat().st_size <= 2_000_000
    assert reader.fields["general.file_type"].contents() == LlamaFileType.MOSTLY_Q4_K_M
    kinds = [tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2]
    # as in the large file: output, and some values and ffn_down
    assert set(kinds) == {"Q4_K", "Q6_K"} and kinds.count("Q6_K") == 3


def test_it_is_read_right(scores):
    """Against its own numbers, unpacked to fp32 by transformers: what is left is that the judge rounds activations to 8 bits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        HERE, gguf_file=FILE.name, dtype=torch.float32
    ).eval()
    expected = scores_in_transformers(model, AutoTokenizer.from_pretrained(HERE))
    assert np.abs(scores - expected).max() < 0.01


def test_it_agrees_with_its_parent(scores, tmp_path):
    """The parent is made again from its seed. 4 bits cost something, but scores that spread over .4 mostly keep their order."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lm.gguf_export import export_gguf

    spec = importlib.util.spec_from_file_location("make", HERE / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    make.write_parent(tmp_path / "parent")
    export_gguf(tmp_path / "parent", tmp_path / "parent.gguf", "F32")
    with TinyLlamaRewardScorer(tmp_path / "parent.gguf", threads=1) as judge:
        parent = np.concatenate(judge.score_steps(SOLUTIONS))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "parent").eval()
    assert (
        np.abs(parent - scores_in_transformers(model, AutoTokenizer.from_pretrained(HERE))).max()
        < 2e-3
    )
    print(
        f"{len(scores)} scores from {parent.min():.3f} to {parent.max():.3f}: correlation {np.corrcoef(scores, parent)[0, 1]:.4f}, "
    )
    print(
        f"mean difference {np.abs(scores - parent).mean():.4f}, largest {np.abs(scores - parent).max():.4f}"
    )
    assert np.ptp(parent) > 0.3
    assert np.corrcoef(scores, parent)[0, 1] > 0.97
    assert np.abs(scores - parent).mean() < 0.08
