"""A Q4_K_M file of llama.cpp's quantizer (tests/data/q4_k_m) in the judge, against its parent."""

import importlib.util

import numpy as np
import pytest
import torch
from gguf import GGUFReader, LlamaFileType
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.files import ROOT
from lm.gguf_export import export_gguf
from reward_model.judges.llamacpp import LlamaCppJudge
from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer
from tests.helpers.transformers_judge import step_scores

pytestmark = pytest.mark.process  # the judge has a process of its own
FOLDER = ROOT / "tests/data/q4_k_m"
FILE = FOLDER / "tiny.Q4_K_M.gguf"


def solution(
    name: str, things: str, has: int, more: int, lost: int, slip: int
) -> tuple[str, list[str]]:
    """A problem and its solution, which is wrong from the first step on if there is a slip."""
    first = has + more + slip
    prompt = (
        f"{name} has {has} {things}. She buys {more} {things}. She loses {lost}. "
        f"How many {things} does {name} have now?"
    )
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


def judge_scores(path, kind=TinyLlamaRewardScorer) -> np.ndarray:
    with kind(path, threads=1) as judge:
        return np.concatenate(judge.score_steps(SOLUTIONS))


@pytest.fixture(scope="module")
def scores() -> np.ndarray:
    return judge_scores(FILE)


def scores_in_transformers(model) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    return np.concatenate([step_scores(model, tokenizer, *solution) for solution in SOLUTIONS])


def test_the_file_is_what_its_name_says():
    reader = GGUFReader(FILE)
    assert FILE.stat().st_size <= 2_000_000
    assert reader.fields["general.file_type"].contents() == LlamaFileType.MOSTLY_Q4_K_M
    kinds = [tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2]
    # as in the large file: the output, and some values and ffn_down
    assert set(kinds) == {"Q4_K", "Q6_K"} and kinds.count("Q6_K") == 3


def test_it_is_read_right(scores):
    """Against its own numbers in fp32, unpacked by transformers. The difference that is left comes
    from the judge, which rounds activations to 8 bits."""
    options = {"gguf_file": FILE.name, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(FOLDER, **options).eval()
    expected = scores_in_transformers(model)
    for found in (scores, judge_scores(FILE, LlamaCppJudge)):
        assert np.abs(found - expected).max() < 0.01


def test_it_agrees_with_its_parent(scores, tmp_path):
    """The parent is made again from its seed. Scores that spread over more than .3 mostly keep
    their order with 4 bits."""
    spec = importlib.util.spec_from_file_location("make", FOLDER / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    make.write_parent(tmp_path / "parent")
    export_gguf(tmp_path / "parent", tmp_path / "parent.gguf", "F32")
    parent = judge_scores(tmp_path / "parent.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "parent").eval()
    assert np.abs(parent - scores_in_transformers(model)).max() < 2e-3
    assert np.ptp(parent) > 0.3
    assert np.corrcoef(scores, parent)[0, 1] > 0.97
    assert np.abs(scores - parent).mean() < 0.08
