"""Whether a model knows the words of a text: the miniatures' own text and text of the world."""

import itertools
import json
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from common.files import ROOT, read_records
from lm.known_words import LEAST_BYTES, tokens_of, unknown_texts, warn_of_unknown_words
from reasoning.datasets.loading import load_problems
from reasoning.records import PreferencePair, Problem
from reward_model.judges.hf import HFJudge
from reward_model.process_reward_model import ProcessRewardModel
from reward_model.response_reward_model import ResponseJudge, ResponseRewardModel
from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer

MODELS = ROOT / "models"
DATA = Path(__file__).parent / "data"
ELSEWHERE = [
    "Anna hat zwölf Äpfel und kauft noch drei Kisten mit je vier Äpfeln.",
    "Marie possède douze pommes, puis elle achète trois caisses de quatre pommes.",
    "小明有十二个苹果,他又买了三箱,每箱四个。 现在他一共有多少个苹果?",
    "كم عدد التفاحات التي يملكها أحمد الآن بعد شراء ثلاث علب",
    "A bakery sells croissants for $2.50 apiece. Determine the revenue of forty croissants.",
    "Find the remainder when $7^{2023}$ is divided by the largest prime factor of $1001$.",
]


@pytest.fixture(scope="module")
def count():
    return partial(tokens_of, AutoTokenizer.from_pretrained(MODELS / "judge-mini"))


def own_texts() -> list[str]:
    texts = []
    for split in ("test", "hard", "validation"):
        problems = read_records(ROOT / f"data/problems_{split}.jsonl", Problem)
        for problem in itertools.islice(problems, 200):
            texts += [problem.prompt, "\n".join((problem.prompt, *problem.steps))]
    pairs = read_records(ROOT / "data/synthetic_dataset.jsonl", PreferencePair)
    for pair in itertools.islice(pairs, 200):
        texts.append("\n".join((pair.prompt, *pair.prefix, *pair.rejected)))
    return texts


def foreign_texts() -> list[str]:
    texts = list(ELSEWHERE)
    for name in ("gsm8k.jsonl", "math.jsonl"):
        texts += [problem.prompt for problem in load_problems(str(DATA / name))]
    lines = (ROOT / "data/prompts_real.jsonl").read_text(encoding="utf-8").splitlines()
    return texts + [json.loads(line)["prompt"] for line in lines]


def test_a_miniature_knows_its_own_world_and_no_other(count):
    own, foreign = own_texts(), foreign_texts()
    assert len(own) == 1400 and len(foreign) > 45
    for text in own:
        assert not unknown_texts(count, [text])[0], text
    for text in foreign:
        unknown, measured, mean = unknown_texts(count, [text])
        assert len(unknown) == measured and mean < LEAST_BYTES, text


@pytest.mark.parametrize("text", ["", "2 + 3 = ?", "x y zz", "f(x) = ax + b", "Step 1: 1 + 1 = 2"])
def test_a_text_of_few_words_tells_nothing(count, text):
    assert unknown_texts(count, [text]) == ([], 0, 0.0)


def test_a_warning_is_one_block_with_numbers_and_what_to_do(count, capsys):
    own = own_texts()[:95]
    assert not warn_of_unknown_words(count, "judge x", own + ELSEWHERE[:5], "do this")
    assert capsys.readouterr() == ("", "")
    assert warn_of_unknown_words(count, "judge x", own + ELSEWHERE * 20, "do this") is False
    assert warn_of_unknown_words(count, "judge x", ELSEWHERE, "do this")
    out, err = capsys.readouterr()
    first, example, advice = err.splitlines()
    assert not out and first.startswith("warning: the judge x has not learned the words of 6 of 6")
    assert "bytes" in first and "Anna hat" in example and advice == "  what to do: do this"


def test_what_shows_no_tokens_warns_of_nothing(capsys):
    assert not warn_of_unknown_words(lambda texts: None, "server", ELSEWHERE, "do this")
    assert capsys.readouterr().err == ""


@pytest.mark.process
def test_every_kind_of_model_counts_with_its_own_tokenizer(count):
    texts = ["has apples more cookies", "Weng earns babysitting"]
    expected = count(texts)
    gguf = MODELS / "judge-mini/judge-mini.Q8_0.gguf"
    with TinyLlamaRewardScorer(gguf, threads=1) as judge:
        # the library tokenizes the middle of a text: no space stands before it
        assert judge.count_tokens([f" {text}" for text in texts]) == expected
        scores = judge.score_steps([("2 + 3 = ?", ["Step 1: 2 + 3 = 5"])])
        assert judge.count_tokens(texts) and scores == judge.score_steps(
            [("2 + 3 = ?", ["Step 1: 2 + 3 = 5"])]
        )
    with HFJudge(MODELS / "judge-mini") as hf, ProcessRewardModel(MODELS / "prm-mini") as prm:
        assert hf.count_tokens(texts) == prm.count_tokens(texts) == expected
    with ResponseJudge(ResponseRewardModel(MODELS / "reward-mini")) as response:
        assert response.count_tokens(texts) == expected
